"""Slot: the order in which windows of training text are read. A loader is a `Spec` and `order(spec, tokens, context,
seed)`, whose `starts(first, count)` says where windows number first .. first+count-1 of the whole run begin."""
