"""Tensors side by side give what they give one after another."""

import pytest
import torch

from fairway.quant.parallel import side_by_side


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_come_in_order_with_one_thread_each_and_threads_come_back(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = list(side_by_side(lambda i: (i * i, torch.get_num_threads()), range(20)))
        assert found == [(i * i, 1) for i in range(20)]
        assert torch.get_num_threads() == threads
        with pytest.raises(ZeroDivisionError):
            list(side_by_side(lambda i: 1 // i, [3, 0, 5]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
