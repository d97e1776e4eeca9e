"""Tensors side by side: one thread for each, instead of all threads on one.

A rounding solve is a long row of small operations. Two threads that share each of them lose more by waiting than they
gain: the 66 matrices of B6's size took 76 s with two on two busy cores and 3 s with one (bench/quantizers.py, "speed").
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`call` of every item, in order, as many at once as torch has threads; each call has one thread to itself.

    What a call computes does not depend on how many run beside it. While it goes on, torch has one thread everywhere.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take it over, this one too
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(call, items)
    finally:
        torch.set_num_threads(threads)
