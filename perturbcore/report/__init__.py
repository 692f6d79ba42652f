"""One offline HTML page from the files of a run folder."""

from perturbcore.report.folder import ReportError, Run
from perturbcore.report.page import write

__all__ = ["ReportError", "Run", "write"]
