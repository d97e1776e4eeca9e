"""Slot: the order in which windows of training text are read. A loader is a `Spec` and `order(spec, tokens, context,
seed)`, whose `rows(tokens, first, count)` gives windows number first .. first+count-1 of the whole run, a pure function
of the seed and these numbers; `windows` is how many one pass over the text holds."""
