"""Slot: how the parameters of one role are updated.

Promise: `build(spec, parameters, ranks)` gives a torch Optimizer that lowers a loss;
its state restores bit for bit.
"""
