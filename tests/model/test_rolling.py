"""The rolling past: a position sees the last `window` positions, from room taken once, in steps as in one pass."""

import math

import pytest
import torch

from fairway.model import RotarySpec, ValueEmbeddingSpec
from fairway.model.attention import exclusive, plain
from fairway.model.embed import bigram_hash, smear
from fairway.model.gpt import GPT, Past
from fairway.model.memory import KeyValue, Rolling
from tests.model.variants import tokens, varied

WINDOW, LENGTH = 7, 41  # nearly six windows; room for 14 positions
CHANGES = [
    {"attention": attention, "kv_heads": groups}
    for attention in (plain.Spec(), exclusive.Spec())
    for groups in (1, 2, 4)
] + [
    {"attention": exclusive.Spec(last=2), "value_residual": "gated", "skips": "gated"},
    {"embed": (bigram_hash.Spec(rows=97, width=8), smear.Spec())},
    {"embed": (), "rotary": RotarySpec(dims=8, reference_context=8), "value_embedding": ValueEmbeddingSpec(width=0)},
]
CUTS = {
    "steps": [1] * LENGTH,
    "threes": [3] * 13 + [2],
    "windows": [7] * 5 + [6],
    "mixed": [1, 3, 7, 1, 1, 7, 3, 1, 6, 7, 1, 3],
    "mixed otherwise": [7, 1, 7, 3, 3, 1, 1, 1, 7, 7, 3],
}


def dense_banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int = 0, mask: None = None) -> torch.Tensor:
    """Attention of a whole sequence by its definition: every product, −∞ outside the band, softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    query, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    products = q @ k.mT / math.sqrt(q.shape[3])
    return torch.softmax(products.masked_fill((key > query) | (key <= query - WINDOW), -math.inf), dim=-1) @ v


def brute_force(model: GPT, text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patched:
        for module in (plain, exclusive):
            patched.setattr(module, "causal_attention", dense_banded)
        return model(text)[0]


def rolled(model: GPT, text: torch.Tensor, cuts: list[int], window: int = WINDOW) -> tuple[torch.Tensor, Past]:
    past, found = model.begin(len(text), window, text.shape[1]), []
    for block in text.split(cuts, dim=1):
        hidden, past = model(block, past)
        found.append(hidden)
    return torch.cat(found, dim=1), past


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_however_a_text_is_cut_it_reads_as_in_one_pass_with_a_banded_mask(changes, cuts, monkeypatch) -> None:
    model, text = varied(**changes), tokens(length=LENGTH)
    expected = brute_force(model, text, monkeypatch)
    found, past = rolled(model, text, cuts)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert past.length == LENGTH
    plain_read, _ = model(text)  # the band counts: without it, what follows the first window differs
    assert (plain_read[:, WINDOW:] - expected[:, WINDOW:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("changes", CHANGES)
@torch.no_grad()
def test_a_text_within_one_window_reads_as_without_one(changes) -> None:
    model, text = varied(**changes), tokens(length=WINDOW)
    whole, _ = model(text)
    for cuts in ([WINDOW], [1] * WINDOW, [3, 1, 3]):
        torch.testing.assert_close(rolled(model, text, cuts)[0], whole, atol=1e-12, rtol=0)
    torch.testing.assert_close(rolled(model, text, [1] * WINDOW, window=50)[0], whole, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_window_of_one_sees_itself_alone() -> None:
    model, text = varied(embed=()), tokens(length=9)
    found, _ = rolled(model, text, [1] * 9, window=1)
    alone = torch.cat([model(text[:, t : t + 1])[0] for t in range(9)], dim=1)
    torch.testing.assert_close(found, alone, atol=1e-12, rtol=0)


@torch.no_grad()
def test_when_lanes_end_the_first_rows_go_on_as_before() -> None:
    model, text = varied(), tokens(rows=4, length=LENGTH)
    whole, _ = rolled(model, text, CUTS["steps"])
    past, found = model.begin(4, WINDOW, LENGTH).narrow(4), []
    for t in range(LENGTH):
        rows = 4 - t // 12
        past = past.narrow(rows)
        hidden, past = model(text[:rows, t : t + 1], past)
        found.append(hidden)
    for t, hidden in enumerate(found):
        torch.testing.assert_close(hidden[:, 0], whole[: 4 - t // 12, t], atol=1e-12, rtol=0)
    assert [len(hidden) for hidden in found[::12]] == [4, 3, 2, 1]


@torch.no_grad()
def test_an_unlimited_past_narrows_too() -> None:
    model, text = varied(), tokens(length=9)
    past = model(text[:, :8])[1].narrow(2)
    torch.testing.assert_close(model(text[:2, 8:], past)[0], model(text)[0][:2, 8:], atol=1e-12, rtol=0)


def rooms(past: Past) -> list[torch.Tensor]:
    return [memory.room for memory in past.layers if isinstance(memory, Rolling)]


@torch.no_grad()
def test_room_is_taken_once_for_two_windows_whatever_the_length() -> None:
    model, text = varied(), tokens(length=LENGTH)
    past = model.begin(3, WINDOW, 10**12)
    places = [room.data_ptr() for room in rooms(past)]
    assert [room.shape for room in rooms(past)] == [(2, 3, 2, 2 * WINDOW, 8)] * 5
    for t in range(LENGTH):
        _, past = model(text[:, t : t + 1], past)
        assert [room.data_ptr() for room in rooms(past)] == places
        for memory in past.layers:
            assert memory.k.shape == memory.v.shape == (3, 2, min(t + 1, WINDOW), 8)
            assert memory.k.untyped_storage().data_ptr() == memory.v.untyped_storage().data_ptr()  # views, not copies
    _, past = model(text[:, :WINDOW], past)
    assert {memory.k.shape[2] for memory in past.layers} == {2 * WINDOW - 1}


@torch.no_grad()
def test_a_short_sequence_takes_room_for_itself_and_no_more() -> None:
    model, text = varied(), tokens(length=10)
    past = model.begin(3, WINDOW, 9)
    assert {room.shape[3] for room in rooms(past)} == {9}
    for t in range(9):
        _, past = model(text[:, t : t + 1], past)
    with pytest.raises(ValueError, match="longer than the 9 positions"):
        model(text[:, 9:], past)


def test_room_is_in_the_type_of_the_activations() -> None:
    model = varied().float()
    assert {room.dtype for room in rooms(model.begin(1, 4, 4))} == {torch.float32}
    model.compute = torch.bfloat16
    past = model.begin(3, 4, 9)
    assert {room.dtype for room in rooms(past)} == {torch.bfloat16}
    with torch.no_grad():
        assert model(tokens(length=3), past)[0].dtype == torch.bfloat16


@torch.no_grad()
def test_a_block_longer_than_the_window_is_refused() -> None:
    model = varied()
    with pytest.raises(ValueError, match="8 positions at once: a rolling past of window 7"):
        model(tokens(length=8), model.begin(3, WINDOW, LENGTH))


@torch.no_grad()
def test_a_past_that_was_written_over_is_refused() -> None:
    model, text = varied(), tokens()
    past = model.begin(3, WINDOW, 14)
    model(text[:, :1], past)
    with pytest.raises(ValueError, match="serves once"):
        model(text[:, 1:2], past)
    with pytest.raises(ValueError, match="serves once"):
        past.narrow(2)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (3, 0, 4), (3, 4, 0)])
def test_a_past_of_nothing_is_refused(sizes) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        varied().begin(*sizes)


def test_an_unlimited_memory_leaves_the_earlier_one_as_it_was() -> None:
    k, v = torch.randn(2, 3, 2, 4, 8, dtype=torch.float64)
    memory = KeyValue(k[:, :, :3], v[:, :, :3])
    longer = memory.extend(k[:, :, 3:], v[:, :, 3:])
    assert torch.equal(longer.k, k)
    assert torch.equal(longer.v, v)
    assert memory.k.shape[2] == 3
