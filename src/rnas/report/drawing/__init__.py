"""Drawings: shapes, charts and cells as SVG, PNG and PDF."""
