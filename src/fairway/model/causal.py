"""Causal softmax attention, over keys that may begin before the queries (cached decoding)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√h) v, each query seeing keys up to its own position.

    q: (B, H, S, h), k and v: (B, G, T, h) with T ≥ S, the queries being the last S positions, G dividing H
    -> (B, H, S, h)
    """
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = None
    if queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
