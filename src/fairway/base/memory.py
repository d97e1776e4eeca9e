"""Freed memory is kept and used again."""

import ctypes
import os
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed() -> bool:
    """Tells glibc to keep what is freed, of any size; whether it does.

    Else a tensor's memory goes back to the system with its last use, and the kernel clears pages for the next one: a
    seventh of a training step on one thread (bench/freed_memory.py on pocket_b6). No block is a mapping of its own:
    glibc takes no threshold above 32 MiB for those, and wiki's logits are 33.5 MB (15 and 23 % of a step's processor
    time; the peak grew by 3 %). Numbers do not change. Where the environment tunes the allocator, or another C library
    is at work, nothing is done.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if tuned or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
