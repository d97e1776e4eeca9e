"""Causal softmax attention, over keys that may begin before the queries (cached decoding)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int = 0, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ/√h) v, each query seeing keys up to its own position.

    q: (B, H, S, h), k and v: (B, G, T, h) with T ≥ S, the queries being the last S positions, G dividing H; window: how
    many positions a query sees, its own included, 0: all; mask: (B, 1, S, T) bool, which keys each query sees, after
    causality and window (None: all that these allow) -> (B, H, S, h)
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if window and keys > window - 1 + queries:  # beyond the first query's window
        keys = window - 1 + queries
        k, v = k[:, :, -keys:], v[:, :, -keys:]
    grouped = q.shape[1] != k.shape[1]
    banded = 0 < window < keys
    if mask is None and queries == keys and not banded:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if mask is None and queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
        mask = mask.triu(keys - queries - window + 1) if banded else mask
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
