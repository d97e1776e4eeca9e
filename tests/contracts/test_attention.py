"""The promise of the slot model/attention, run on every file in it: causal, deterministic, batch-invariant,
float64-clean, within its window, and the same step by step (|batch − cached| ≤ 1e-12).

A technique offers `Spec` and `Technique(spec, layer, layers)`, called with q: (B, H, S, h), k and v: (B, G, T, h), the
queries being the last S positions, and how many positions a query sees (window=0: all), and where a
mask says so which -> (B, H, S, h).
`pytest tests/contracts -k NAME` runs one technique.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.model import ModelSpec, build_model
from fairway.model.causal import causal_attention

FOLDER, LAYERS, F64 = "fairway.model.attention", 3, torch.float64
VARIANTS = {"exclusive": [{"last": 1}]}  # beside the default Spec; a new technique may add its own
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def attends(kind, table):
    """The technique as each layer has it."""
    module = technique(FOLDER, kind)
    spec = build(module.Spec, table)
    return [module.Technique(spec, layer, LAYERS).double() for layer in range(LAYERS)]


def drawn(groups=2, heads=4, length=9):
    chance = torch.Generator().manual_seed(groups)
    return [torch.randn(3, n, length, 8, dtype=F64, generator=chance) for n in (heads, groups, groups)]


def check_causal(attend):
    """A changed position moves nothing before it, to the bit, and something from it on."""
    q, k, v = drawn()
    before = attend(q, k, v)
    for place in (0, 4, 8):
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[:, :, place:] += 1.5
        after = attend(*others)
        assert torch.equal(after[:, :, :place], before[:, :, :place])
        assert not torch.equal(after[:, :, place], before[:, :, place])


def check_cached(attend):
    """The last queries alone, over all keys, give the last outputs."""
    for groups in (1, 2, 4):
        q, k, v = drawn(groups)
        whole = attend(q, k, v)
        for start in (8, 3, 1):
            assert (attend(q[:, :, start:], k, v) - whole[:, :, start:]).abs().max() <= 1e-12
        for stop in (1, 5):  # and the first outputs need no later keys
            assert (attend(q[:, :, :stop], k[:, :, :stop], v[:, :, :stop]) - whole[:, :, :stop]).abs().max() <= 1e-12


def check_batch_invariant(attend):
    q, k, v = drawn()
    alone = torch.cat([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i in range(len(q))])
    assert (attend(q, k, v) - alone).abs().max() <= 1e-12


def check_deterministic(attend):
    q, k, v = drawn()
    kept = [x.clone() for x in (q, k, v)]
    assert torch.equal(attend(q, k, v), attend(q, k, v))
    assert all(torch.equal(x, y) for x, y in zip(kept, (q, k, v), strict=True)), "arguments stay as they were"


def check_float64(attend):
    """Float64 in, float64 out, and digits that a float32 in between would have lost."""
    q, k, v = drawn()
    y = attend(q, k, v)
    assert y.dtype == F64
    assert y.shape == q.shape
    nudged = attend(q, k, v * (1 + 1e-11))
    assert 0 < (nudged - y).abs().max() < 1e-9


def check_window(attend):
    """A position's output is that over its last `window` keys alone, wherever keys and queries begin."""
    for groups in (1, 2, 4):
        q, k, v = drawn(groups)
        for window in (1, 3, 8, 9, 20):
            whole = attend(q, k, v, window=window)
            for t in range(9):
                near = slice(max(0, t + 1 - window), t + 1)
                alone = attend(q[:, :, t : t + 1], k[:, :, near], v[:, :, near])
                assert (alone - whole[:, :, t : t + 1]).abs().max() <= 1e-12
            for start in (8, 6, 1):
                last = attend(q[:, :, start:], k, v, window=window)
                assert (last - whole[:, :, start:]).abs().max() <= 1e-12


def check_mask(attend):
    """Two texts in one, kept apart by a mask, are what each is alone."""
    for groups in (1, 2, 4):
        q, k, v = drawn(groups)
        places = torch.arange(9)
        mask = (places <= places[:, None]) & ((places >= 4) == (places[:, None] >= 4))
        whole = attend(q, k, v, 0, mask[None, None])
        for part in (slice(0, 4), slice(4, 9)):
            alone = attend(q[:, :, part], k[:, :, part], v[:, :, part])
            assert (alone - whole[:, :, part]).abs().max() <= 1e-12


CHECKS = [check_causal, check_cached, check_batch_invariant, check_deterministic, check_float64, check_window]
CHECKS += [check_mask]


@every_technique
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_it_keeps_the_promise(kind, table, check):
    for attend in attends(kind, table):
        check(attend)


@every_technique
def test_gradients_reach_queries_keys_and_values(kind, table):
    inputs = [x.requires_grad_() for x in drawn()]
    for attend in attends(kind, table):
        found = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
        assert all(bool(torch.isfinite(g).all()) and float(g.abs().max()) > 0 for g in found)


@every_technique
def test_a_model_of_it_is_the_same_in_batch_and_step_by_step(kind, table):
    spec = build(
        ModelSpec,
        {"width": 32, "layers": LAYERS, "heads": 4, "kv_heads": 2, "hidden": 48, "context": 16, "rotary": {"dims": 4}}
        | {"attention": {"kind": kind, **table}},
    )
    assert build(ModelSpec, to_plain(spec)) == spec, "it survives a recipe"
    model, chance = build_model(spec, 61, 0).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh model has matrices of zeros, which would hide what attention does
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=chance, dtype=F64)
    tokens = torch.randint(0, 61, (2, 12), generator=chance)
    whole, past, steps = model(tokens)[0], None, []
    for t in range(12):
        hidden, past = model(tokens[:, t : t + 1], past)
        steps.append(hidden)
    assert (torch.cat(steps, 1) - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", kinds(FOLDER))
def test_it_says_what_it_is_and_its_spec_is_frozen(kind):
    module = technique(FOLDER, kind)
    assert len(module.__doc__) > 40
    with pytest.raises(dataclasses.FrozenInstanceError):
        module.Spec().anything = 1


def peeking(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # no mask


def first_key_by_length(q, k, v):
    """Causal in a batch; a cached query is read as if it stood at the window's start."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def mixing_rows(q, k, v):
    y = causal_attention(q, k, v)
    return y - 0.1 * y.mean(0, keepdim=True)


def forgetful(q, k, v):
    return causal_attention(q, k, v) + torch.rand(())


def narrow(q, k, v):
    return causal_attention(q.float(), k.float(), v.float()).to(q.dtype)


def boundless(q, k, v, window=0):
    return causal_attention(q, k, v)


def over_the_border(q, k, v, window=0, mask=None):
    return causal_attention(q, k, v, window)


BROKEN = [peeking, first_key_by_length, mixing_rows, forgetful, narrow, boundless, over_the_border]


@pytest.mark.parametrize(("attend", "check"), list(zip(BROKEN, CHECKS, strict=True)))
def test_a_broken_technique_is_found_out(attend, check):
    with pytest.raises(AssertionError):
        check(attend)
