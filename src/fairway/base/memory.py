"""Freed memory is kept and used again."""

import ctypes
import os
import sys

# <malloc.h> of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 << 20  # bytes: HEAP_MAX_SIZE / 2, beyond which glibc refuses
_NEVER = 2**31 - 1


def keep_freed() -> bool:
    """Tells glibc to keep what is freed, blocks up to 32 MiB; whether it does.

    Else a tensor's memory goes back to the system with its last use, and the kernel clears pages for the next one: a
    seventh of a training step on one thread (bench/freed_memory.py on pocket_b6). Numbers do not change. Where the
    environment tunes the allocator, or another C library is at work, nothing is done.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if tuned or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
