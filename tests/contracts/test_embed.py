"""The promise of the slot model/embed, run on every file in it: a feature of a token and the one before it.

A technique offers `Spec` and `Technique(spec, width, bos, apart)` with `stage`, called with x: (B, S, d), tokens:
(B, S) and its memory of the position before -> x of the same shape, and the memory for the next. One token of memory,
causal, batch-invariant, float64-clean; apart, a document begins as a window does.
"""

import pytest
import torch

from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.model import ModelSpec, build_model, tags

FOLDER, F64, VOCAB, BOS = "fairway.model.embed", torch.float64, 37, 1
VARIANTS = {"smear": [{"document_aware": True}], "bigram_hash": [{"rows": 11, "width": 4}]}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in ({}, *VARIANTS.get(kind, ()))]
every_technique = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))


def made(kind, table):
    """The technique with weights that are not at their start, vectors looked up from a table, and tokens."""
    module, chance = technique(FOLDER, kind), torch.Generator().manual_seed(3)
    part = module.Technique(build(module.Spec, table), 12, BOS).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=chance, dtype=F64))
    vectors = torch.randn(VOCAB, 12, generator=chance, dtype=F64)
    tokens = torch.randint(2, VOCAB, (3, 9), generator=chance)
    tokens[:, 0] = tokens[1, 5] = BOS
    return part, vectors, tokens


@every_technique
def test_a_token_reaches_its_own_position_and_the_next_and_no_other(kind, table):
    part, vectors, tokens = made(kind, table)
    before, _ = part(vectors[tokens], tokens, None)
    for place in range(9):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 3) % VOCAB
        after, _ = part(vectors[other], other, None)
        moved = (after != before).any(-1).any(0).nonzero().flatten().tolist()
        assert place in moved
        assert set(moved) <= {place, place + 1}


@every_technique
def test_its_memory_of_one_token_continues_a_text_wherever_it_is_cut(kind, table):
    part, vectors, tokens = made(kind, table)
    whole, last = part(vectors[tokens], tokens, None)
    for cut in range(1, 9):
        first, memory = part(vectors[tokens[:, :cut]], tokens[:, :cut], None)
        rest, end = part(vectors[tokens[:, cut:]], tokens[:, cut:], memory)
        assert (torch.cat((first, rest), 1) - whole).abs().max() <= 1e-12
        assert memory.shape[:2] == (3, 1)
        assert torch.equal(end, last)


@every_technique
def test_where_documents_are_kept_apart_each_begins_as_a_window_does(kind, table):
    module = technique(FOLDER, kind)
    joined, vectors, tokens = made(kind, table)
    apart = module.Technique(build(module.Spec, table), 12, BOS, True).double()
    apart.load_state_dict(joined.state_dict())
    row = tokens[1:2]  # BOS at 0 and 5
    parts = [joined(vectors[part], part, None)[0] for part in (row[:, :5], row[:, 5:])]
    whole, _ = apart(vectors[row], row, None)
    assert (torch.cat(parts, 1) - whole).abs().max() <= 1e-12
    memory = apart(vectors[row[:, :5]], row[:, :5], None)[1]
    assert (apart(vectors[row[:, 5:]], row[:, 5:], memory)[0] - parts[1]).abs().max() <= 1e-12


@every_technique
def test_rows_do_not_see_each_other_and_nothing_is_left_to_chance(kind, table):
    part, vectors, tokens = made(kind, table)
    whole, _ = part(vectors[tokens], tokens, None)
    assert torch.equal(whole, part(vectors[tokens], tokens, None)[0])
    alone = torch.cat([part(vectors[row[None]], row[None], None)[0] for row in tokens])
    assert (alone - whole).abs().max() <= 1e-12


@every_technique
def test_it_is_clean_in_float64(kind, table):
    part, vectors, tokens = made(kind, table)
    out, _ = part(vectors[tokens], tokens, None)
    assert out.dtype == F64
    assert out.shape == (3, 9, 12)
    assert 0 < (part(vectors[tokens] * (1 + 1e-11), tokens, None)[0] - out).abs().max() < 1e-9


@every_technique
def test_a_model_of_it_alone_trains_knows_its_roles_and_survives_a_recipe(kind, table):
    table = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 2, "hidden": 24, "rotary": {"dims": 4}} | {
        "embed": [{"kind": kind, **table}]
    }
    spec = build(ModelSpec, table)
    assert build(ModelSpec, to_plain(spec)) == spec
    model, (_, _, tokens) = build_model(spec, VOCAB, 0), made(kind, {})
    assert model.embed[0].stage in ("before_norm", "after_norm")
    assert set(tags(model)) == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.logits(model(tokens)[0]).logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.embed.parameters())
