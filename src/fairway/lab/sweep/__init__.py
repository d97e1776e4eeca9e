"""Many runs by one command: a plan with stable ids, engines that run what is not finished, and a book of what ended."""

from fairway.lab.sweep.book import Book, finished, read_plan
from fairway.lab.sweep.plan import Approach, Planned, approaches, folder_name, plan

__all__ = ["Approach", "Book", "Planned", "approaches", "finished", "folder_name", "plan", "read_plan"]
