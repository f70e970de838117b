"""A trained network leaves the house."""
