"""fairway: the best language model that fits a byte budget, scored as the size of a file that decodes."""

__version__ = "0.1.0"
