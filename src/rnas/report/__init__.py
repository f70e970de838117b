"""Run folders as something to look at: the HTML page, the cell drawings, paired comparisons (`rnas.report.compare`).
No torch here."""

from rnas.report.drawing.cells import cells_drawing, draw_cells
from rnas.report.drawing.shapes import Drawing
from rnas.report.page import write_report

__all__ = ["Drawing", "cells_drawing", "draw_cells", "write_report"]
