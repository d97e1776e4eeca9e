"""Documents apart: in a window, in steps, from a rolling past, a document is what it is alone."""

import pytest
import torch

from fairway.artifact.header import Header, from_json, to_json
from fairway.base.specs import to_plain
from fairway.model import ModelSpec, RotarySpec, ValueEmbeddingSpec
from fairway.model.attention import exclusive, plain
from fairway.model.embed import bigram_hash, smear
from fairway.model.gpt import GPT
from tests.model.variants import BASE, VOCAB, varied

BOS, LENGTHS = 1, (1, 9, 4, 2, 14)  # of documents, in tokens
CHANGES = [
    {"attention": plain.Spec(), "kv_heads": 4},
    {"attention": exclusive.Spec(), "value_residual": "gated", "skips": "gated"},
    {"attention": exclusive.Spec(last=2), "embed": (bigram_hash.Spec(rows=97, width=8), smear.Spec())},
    {"embed": (), "rotary": RotarySpec(dims=8, reference_context=8), "value_embedding": ValueEmbeddingSpec(width=0)},
]


def documents(seed: int = 0) -> list[torch.Tensor]:
    """(1, n) each, beginning with BOS."""
    chance = torch.Generator().manual_seed(seed)
    found = [torch.randint(2, VOCAB, (1, length), generator=chance) for length in LENGTHS]
    for document in found:
        document[:, 0] = BOS
    return found


def stepped(model: GPT, text: torch.Tensor, cuts: list[int], window: int = 0) -> torch.Tensor:
    past, found = model.begin(len(text), window, text.shape[1]) if window else None, []
    for block in text.split(cuts, dim=1):
        hidden, past = model(block, past)
        found.append(hidden)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_a_document_is_what_it_is_alone(changes: dict[str, object]) -> None:
    """In float64, for every document of a window; two windows whose documents begin elsewhere, side by side."""
    model, rows = varied(apart=True, **changes), [documents(0), documents(1)[::-1]]
    whole = model(torch.cat([torch.cat(row, dim=1) for row in rows]))[0]
    for row, hidden in zip(rows, whole, strict=True):
        alone = torch.cat([model(document)[0] for document in row], dim=1)
        assert (hidden - alone[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_alone_it_is_what_a_model_says_that_joins_documents(changes: dict[str, object]) -> None:
    apart, joined = varied(apart=True, **changes), varied(**changes)
    (*_, document) = documents()
    assert (apart(document)[0] - joined(document)[0]).abs().max() <= 1e-12
    text = torch.cat(documents(), dim=1)
    assert (apart(text)[0] - joined(text)[0])[:, 10:].abs().max() > 1e-3, "and with others before it, it is not"


@pytest.mark.parametrize("cuts", [[1] * 30, [3] * 10, [8, 1, 1, 20], [30]])
@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_step_by_step_it_reads_as_in_one_pass(changes: dict[str, object], cuts: list[int]) -> None:
    model = varied(apart=True, **changes)
    text = torch.cat([torch.cat(documents(0), dim=1), torch.cat(documents(1)[::-1], dim=1)])
    assert (stepped(model, text, cuts) - model(text)[0]).abs().max() <= 1e-12
    assert (stepped(model, text, cuts, window=30) - model(text)[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("cuts", [[1] * 30, [5] * 6, [2, 5, 1, 4, 5, 3, 5, 5]])
@torch.no_grad()
def test_a_rolling_past_sees_its_own_document_within_its_window(cuts: list[int]) -> None:
    """Documents of at most 14 tokens through a window of 5: each as a rolling past of its own reads it."""
    model, row = varied(apart=True), documents()
    text = torch.cat(row, dim=1)
    alone = torch.cat([stepped(model, document, [1] * document.shape[1], window=5) for document in row], dim=1)
    assert (stepped(model, text, cuts, window=5) - alone).abs().max() <= 1e-12


@torch.no_grad()
def test_fewer_rows_keep_their_own_documents() -> None:
    model = varied(apart=True)
    text = torch.cat([torch.cat(documents(0), dim=1), torch.cat(documents(1)[::-1], dim=1)])
    _, past = model(text[:, :12])
    hidden, _ = model(text[:1, 12:], past.narrow(1))
    assert (hidden - model(text[:1])[0][:, 12:]).abs().max() <= 1e-12


def test_nothing_flows_back_over_a_border() -> None:
    model, text = varied(apart=True), torch.cat(documents(), dim=1)
    embedded: list[torch.Tensor] = []
    hook = model.embedding.register_forward_hook(lambda *seen: embedded.append(seen[2].requires_grad_()) or seen[2])
    hidden = model(text)[0]
    hook.remove()
    (gradient,) = torch.autograd.grad(hidden[:, 14:16].square().sum(), embedded[0])
    assert (gradient[:, 14:16] != 0).any()
    assert not gradient[:, :14].any()
    assert not gradient[:, 16:].any()


def test_an_artifacts_header_says_so_and_says_nothing_where_documents_are_joined() -> None:
    """The bytes of files of joined documents are those of the first format."""
    for apart in (False, True):
        header = Header(ModelSpec(**{**BASE, "apart": apart}), VOCAB, {}, "", "brotli", (), (), ())
        assert (b"apart" in to_json(header)) is apart
        assert from_json(to_json(header)) == header
        assert to_plain(header.model)["apart"] is apart
