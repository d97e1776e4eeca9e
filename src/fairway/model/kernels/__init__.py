"""Kernels for one kind of device.

Each has a plain PyTorch twin of the same signature, in the part that uses it: the twin is the definition, and a test
compares the two. A kernel is an operator of torch's own, so that `torch.compile` calls it and cannot pass it by, and it
counts its launches: whether it ran is a number, not a belief.
"""
