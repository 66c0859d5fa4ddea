"""The report page: one HTML file that holds everything, from the JSON that the commands write."""

from __future__ import annotations

from onnxslim_lab.report_page.page import render
from onnxslim_lab.report_page.reading import Sources, read_sources

__all__ = ["Sources", "read_sources", "render"]
