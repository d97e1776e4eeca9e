"""Pages for people: one file of HTML for a run, one for a sweep."""

from fairway.lab.report.folder import Folder, open_folder
from fairway.lab.report.run import run_page
from fairway.lab.report.sweep import PAGE, sweep_page

__all__ = ["PAGE", "Folder", "open_folder", "run_page", "sweep_page"]
