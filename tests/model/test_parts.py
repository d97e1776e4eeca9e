"""Each part against its formula, written once more in the plainest way."""

import math

import pytest
import torch

from fairway.base.errors import RecipeError
from fairway.base.specs import build
from fairway.model import ModelSpec, RotarySpec
from fairway.model.attention.exclusive import exclude_own_value
from fairway.model.causal import causal_attention
from fairway.model.embed.bigram_hash import bigram_index
from fairway.model.embed.smear import Spec as SmearSpec
from fairway.model.embed.smear import Technique as Smear
from fairway.model.mlp.leaky_relu2 import leaky_relu2
from fairway.model.mlp.relu2 import relu2
from fairway.model.rotary import rotary_base, rotate, rotation
from fairway.model.value import ValueResidual
from tests.model.variants import varied

torch.manual_seed(0)
F64 = torch.float64


def test_causal_attention_is_the_softmax_of_scaled_products_with_grouped_heads() -> None:
    q, k, v = (torch.randn(2, heads, 6, 8, dtype=F64) for heads in (4, 2, 2))
    y = causal_attention(q, k, v)
    for head in range(4):
        group = head // 2
        for t in range(6):
            weights = torch.softmax(q[:, head, t, None] @ k[:, group, : t + 1].mT / math.sqrt(8), dim=-1)
            torch.testing.assert_close(y[:, head, t], (weights @ v[:, group, : t + 1])[:, 0])
    torch.testing.assert_close(causal_attention(q[:, :, 4:], k, v), y[:, :, 4:])


def test_exclusive_attention_is_orthogonal_to_its_own_value() -> None:
    y, v = torch.randn(2, 4, 6, 8, dtype=F64), torch.randn(2, 2, 6, 8, dtype=F64)
    out = exclude_own_value(y, v)
    for head in range(4):
        own = v[:, head // 2]
        assert (out[:, head] * own).sum(-1).abs().max() < 1e-12
        along = (y[:, head] * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
        torch.testing.assert_close(out[:, head], y[:, head] - along)
    assert torch.equal(exclude_own_value(y, torch.zeros_like(v)), y)


def test_rotation_keeps_norms_and_turns_products_into_functions_of_distance() -> None:
    x, z = torch.randn(8, dtype=F64), torch.randn(8, dtype=F64)
    cos, sin = rotation(0, 50, 4, 10000.0, like=x)
    turned = rotate(x.expand(50, 8), cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm().expand(50))
    assert torch.equal(turned[:, 4:], x[4:].expand(50, 4))
    other = rotate(z.expand(50, 8), cos, sin)
    torch.testing.assert_close(turned[7] @ other[3], turned[40] @ other[36])


def test_rotation_from_a_later_start_continues_the_same_angles() -> None:
    like = torch.zeros((), dtype=F64)
    whole, later = rotation(0, 30, 16, 1234.5, like), rotation(20, 10, 16, 1234.5, like)
    assert torch.equal(whole[0][20:], later[0])
    assert torch.equal(whole[1][20:], later[1])


def test_the_ntk_rule_raises_the_base_with_the_training_context_alone() -> None:
    assert rotary_base(RotarySpec(dims=16), 2048) == pytest.approx(10000 * 2 ** (16 / 14))
    assert rotary_base(RotarySpec(dims=16), 1024) == 10000
    assert rotary_base(RotarySpec(dims=16, reference_context=0), 4096) == 10000


def test_bigram_index_by_hand() -> None:
    text = torch.tensor([[5, 900, 17]])
    rows = 6144
    pairs = [rows - 1, ((36313 * 900) ^ (27191 * 5)) % (rows - 1), ((36313 * 17) ^ (27191 * 900)) % (rows - 1)]
    assert bigram_index(text, None, rows).tolist() == [pairs]
    assert bigram_index(text[:, 1:], text[:, :1], rows).tolist() == [pairs[1:]]


def test_smear_by_hand_and_nothing_flows_into_a_bos_when_documents_count() -> None:
    u, text = torch.randn(1, 4, 3, dtype=F64), torch.tensor([[1, 5, 1, 6]])
    plain, aware = (Smear(SmearSpec(document_aware=flag), 3, bos=1).double() for flag in (False, True))
    out, _ = plain(u, text, None)
    torch.testing.assert_close(out[0, 0], 0.5 * u[0, 0])
    torch.testing.assert_close(out[0, 2], 0.5 * u[0, 2] + 0.5 * u[0, 1])
    guarded, _ = aware(u, text, None)
    torch.testing.assert_close(guarded[0, 2], 0.5 * u[0, 2])
    torch.testing.assert_close(guarded[0, [1, 3]], out[0, [1, 3]])


@pytest.mark.parametrize(("f", "negative"), [(relu2, 0.0), (lambda p: leaky_relu2(p, 0.5), 0.5)])
def test_squared_activations_have_the_stated_derivative(f, negative: float) -> None:
    p = torch.tensor([-2.0, -0.5, 0.7, 3.0], dtype=F64, requires_grad=True)
    f(p).sum().backward()
    torch.testing.assert_close(p.grad, torch.where(p > 0, 2 * p, negative * p).detach())
    assert torch.autograd.gradcheck(f, (p.detach().requires_grad_(),))


def test_value_residual_additive_and_gated() -> None:
    v, first = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    torch.testing.assert_close(ValueResidual("additive", 1)(v, first), v + 0.5 * first)
    g = 1 / (1 + math.exp(1.5))
    torch.testing.assert_close(ValueResidual("gated", 1).double()(v, first), (1 - g) * v + g * first)


def test_query_gain_scales_attention_logits_within_their_bound() -> None:
    """|q| = |k| = √h, so that logits lie within ±√h·gain: at a huge gain attention becomes a choice of one."""
    model = varied()
    attention = model.blocks[0].attention
    with torch.no_grad():
        attention.gain.fill_(0.0)
    seen = []
    attention.attend.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(torch.randint(0, 61, (1, 8)))
    q, k, *_ = seen[0]
    assert q.abs().max() == 0
    torch.testing.assert_close(k.norm(dim=-1), torch.full((1, 2, 8), math.sqrt(8), dtype=F64), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"width": 100, "heads": 8}, "does not divide width"),
        ({"heads": 8, "kv_heads": 3}, "does not divide heads"),
        ({"rotary": {"dims": 7}}, "even number"),
        ({"rotary": {"dims": 128}}, "more than a head's 64 dimensions"),
        ({"layers": 0}, "at least 1"),
        ({"value_embedding": {"layers": [11]}}, "layers go from 0 to 10"),
        ({"attention": "exclusiv"}, "did you mean 'exclusive'"),
        ({"mlp": {"kind": "leaky_relu2", "slop": 0.3}}, "did you mean 'slope'"),
    ],
)
def test_an_impossible_model_is_refused_in_one_line(table: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        build(ModelSpec, table, "model")
    assert "\n" not in str(caught.value)
