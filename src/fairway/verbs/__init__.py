"""What each verb of the command line does, and how its answer is printed: one file for one kind of work."""
