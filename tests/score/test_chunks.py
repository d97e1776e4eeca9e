"""Proof of chunks: drawn by what was booked and a nonce, taken again, decoded; and every way of lying is caught."""

import dataclasses
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from fairway.artifact import PackSpec, open_artifact, seal
from fairway.base.errors import ArtifactError, DataError, HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.data import Corpus, tokenize
from fairway.score import ScoreSpec, chunks, decompress, evaluate, prove_chunks
from fairway.score.adapt import ttt
from fairway.score.booking import BOOKED, Booked, read_booked, read_state, snapshot_path, write_state
from fairway.score.chunks import ChunkProof, decode_chunk, draw
from fairway.score.windows import plain, rolling, sliding

from . import nearby
from .cheats import LearnsBeforeItScores, Peeks
from .conftest import ADAPT, text_of

CHUNKS = 6
EVALUATE = sys.modules["fairway.score.evaluate"]  # its name in the package is the function's
SPEC = build(
    ScoreSpec,
    {
        "result": "adapted",
        "windows": {"kind": "sliding", "stride": 32},
        "adapt": {**ADAPT, "chunk": 64, "epochs": 1},
        "exact": True,
        "snapshots": 2,
    },
)


@pytest.fixture(scope="module")
def text(files):
    """About 350 targets in two documents: six chunks of 64."""
    documents = (text_of(70_000, 250), text_of(80_000, 250))
    return tokenize(Corpus("valid", documents), open_artifact(files[1]).tokenizer)


@pytest.fixture(scope="module")
def scored(files, text, tmp_path_factory):
    """(run folder of an exact adapted score, score)"""
    folder = tmp_path_factory.mktemp("scored")
    with Run(folder) as run:
        score = evaluate(files[1], text, SPEC, run, "adapted")
    assert len(read_booked(folder).nats) == CHUNKS
    return folder, score


@pytest.fixture
def given(monkeypatch):
    return nearby.watch(monkeypatch)


@pytest.fixture
def folder(scored, tmp_path):
    """A copy to lie in."""
    return shutil.copytree(scored[0], tmp_path / "run")


def rebook(folder, **changes) -> None:
    table = json.loads((folder / BOOKED).read_text())
    (folder / BOOKED).write_text(json.dumps({**table, **changes}))


def proven(files, text, folder, count=CHUNKS, nonce="n", spec=SPEC, **more) -> ChunkProof:
    return prove_chunks(files[1], text, spec, Run(), folder, count, nonce, **more)


def test_all_chunks_are_taken_again_and_decoded(files, text, scored, given):
    folder, score = scored
    proof = proven(files, text, folder, claimed_bits=score.code_length_bits)
    assert proof.decoded_equal
    assert proof.chunks == tuple(range(CHUNKS))
    assert (proof.of_chunks, proof.catches) == (CHUNKS, 1.0)
    assert proof.replayed == CHUNKS - 1
    assert proof.text_bytes == len(text.text)
    assert proof.booked_bits == pytest.approx(score.code_length_bits, rel=1e-12)
    assert abs(proof.ideal_bits - proof.booked_bits) < 2e-4 * len(text) + 4 * 0.0065 * len(text) ** 0.5
    assert 0 <= 8 * (proof.file_bytes - proof.framing_bytes) - proof.booked_bits < 80 * CHUNKS
    assert len(given) == CHUNKS


def test_a_decoding_process_has_the_artifact_the_file_the_state_and_what_is_before_alone(
    files, text, scored, monkeypatch
):
    given = nearby.watch(monkeypatch, here=False)
    proof = proven(files, text, scored[0], 1, "a nonce")
    (chunk,) = proof.chunks
    (only,) = given
    assert only.command[3] == "decode-chunk"
    assert set(only.files) == {"artifact.fw", "text.fwc", "state", "before"}
    assert not only.folder.exists()
    before = np.frombuffer(only.files["before"], "<u2")
    last = max(64 * chunk, 0)  # one target of the chunk would be one too many
    assert before.tolist() == text.tokens[1 + last - len(before) : 1 + last].tolist()
    assert len(before) <= 64
    state = safetensors.torch.load(only.files["state"])
    assert {name.split(".")[0] for name in state} <= {"weight", "step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("lanes", "windows"), [(2, plain.Spec()), (4, sliding.Spec(8))], ids=["two plain lanes", "four sliding lanes"]
)
def test_lanes_share_the_chunks_that_are_proven(files, text, given, tmp_path, lanes, windows):
    spec = replace(SPEC, lanes=lanes, windows=windows)
    with Run(tmp_path) as run:
        score = evaluate(files[1], text, spec, run, "adapted")
    total = len(read_booked(tmp_path).nats)
    proof = proven(files, text, tmp_path, total, spec=spec, claimed_bits=score.code_length_bits)
    assert proof.chunks == tuple(range(total))
    assert proof.text_bytes == len(text.text)


def test_windows_longer_than_a_chunk_leave_chunks_that_score_nothing(files, text, given, tmp_path):
    """A first window of 64 targets over chunks of 16: those between have nothing to decode, but a state to check."""
    spec = replace(SPEC, adapt=replace(SPEC.adapt, chunk=16))
    with Run(tmp_path) as run:
        evaluate(files[1], text, spec, run, "adapted")
    booked = read_booked(tmp_path)
    empty = [chunk for chunk, nats in enumerate(booked.nats) if float.fromhex(nats) == 0]
    assert {1, 2, 3} <= set(empty)
    nonce = next(str(n) for n in range(9999) if set(draw(booked, 1, str(n))) <= set(empty))
    with pytest.raises(DataError, match="the drawn chunks score nothing of their own; ask for more"):
        proven(files, text, tmp_path, 1, nonce, spec)
    everything = proven(files, text, tmp_path, len(booked.nats), "n", spec)
    assert everything.text_bytes == text.text_bytes
    assert everything.replayed == len(booked.nats) - 1
    rebook(tmp_path, nats=["0x1.0p+0" if chunk == 1 else nats for chunk, nats in enumerate(booked.nats)])
    with pytest.raises(HonestyError, match="chunk 1: scores nothing"):
        proven(files, text, tmp_path, len(booked.nats), "n", spec)


def test_from_a_snapshot_at_least_the_last_step_is_taken_again(files, text, scored, given):
    """Snapshots at 2 and 4: for chunk 5 one step from 4, for chunk 4 two from 2, for chunk 1 one from the beginning."""
    booked = read_booked(scored[0])
    assert booked.snapshots == (2, 4)
    for chunk, steps in {0: 0, 1: 1, 4: 2, 5: 1}.items():
        nonce = next(str(n) for n in range(9999) if draw(booked, 1, str(n)) == [chunk])
        proof = proven(files, text, scored[0], 1, nonce)
        assert (proof.chunks, proof.replayed) == ((chunk,), steps)
        assert proof.catches == 1 / CHUNKS


def changed_books(booked: Booked) -> dict[str, Booked]:
    flip = {"0": "1"}.get(booked.states[3][0], "0") + booked.states[3][1:]
    nats = (*booked.nats[:2], (float.fromhex(booked.nats[2]) + 1e-9).hex(), *booked.nats[3:])
    return {
        "artifact": replace(booked, artifact_sha256="0" * 64),
        "text": replace(booked, text_sha256="0" * 64),
        "a state": replace(booked, states=(*booked.states[:3], flip, *booked.states[4:])),
        "a price": replace(booked, nats=nats),
        "the chunk": replace(booked, chunk=booked.chunk + 1),
    }


def many() -> Booked:
    """Books of 200 chunks, so that two draws of 5 are the same by chance once in 2.5 billion."""
    states = tuple(f"{chunk:064x}" for chunk in range(200))
    return Booked("a" * 64, "b" * 64, 64, states, tuple(float(chunk).hex() for chunk in range(200)), (10, 20))


@pytest.mark.parametrize("what", ["artifact", "text", "a state", "a price", "the chunk"])
def test_whatever_is_booked_draws_other_chunks_when_it_changes(what):
    assert draw(changed_books(many())[what], 5, "n") != draw(many(), 5, "n")


def test_a_nonce_draws_other_chunks_and_the_same_nonce_the_same():
    assert draw(many(), 5, "n") == draw(many(), 5, "n")
    assert len({tuple(draw(many(), 5, f"n{k}")) for k in range(50)}) == 50
    without = replace(many(), snapshots=())
    assert draw(without, 5, "n") == draw(many(), 5, "n"), "what is kept beside is no part of the claim"


def test_draws_are_different_chunks_and_each_is_drawn_as_often():
    """200 chunks, 7 of them, 600 nonces: each 21 times, deviation 4.5."""
    counts = np.zeros(200)
    for nonce in range(600):
        drawn = draw(many(), 7, str(nonce))
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 7
        counts[drawn] += 1
    assert 3 < counts.min() <= counts.max() < 45
    assert draw(many(), 200, "n") == list(range(200))


def test_a_false_step_is_caught_as_often_as_its_chunk_is_drawn(files, text, folder, given):
    """K/C: with one of six chunks drawn, about every sixth nonce."""
    booked = read_booked(folder)
    false = (float.fromhex(booked.nats[4]) * 0.5).hex()
    rebook(folder, nats=[*booked.nats[:4], false, *booked.nats[5:]])
    drawn = [draw(read_booked(folder), 1, str(nonce))[0] for nonce in range(600)]
    assert 60 < drawn.count(4) < 140, "of 600: 100 on average, 9 their deviation"
    with pytest.raises(HonestyError):
        proven(files, text, folder, 1, str(drawn.index(4)))
    others = [drawn.index(chunk) for chunk in (0, 5)]
    assert all(proven(files, text, folder, 1, str(nonce)).decoded_equal for nonce in others)


# Ways of lying.


@pytest.mark.parametrize("chunk", [0, 3, CHUNKS - 1])
def test_a_booked_state_that_is_another_is_caught(files, text, folder, given, chunk):
    states = list(read_booked(folder).states)
    states[chunk] = states[chunk - 1]
    rebook(folder, states=states)
    with pytest.raises(HonestyError, match=f"chunk {chunk}: the state at its start is .* was booked; this is no score"):
        proven(files, text, folder)


@pytest.mark.parametrize("lie", [0.999, 1.001, 0.0])
def test_a_booked_price_that_is_another_is_caught(files, text, folder, given, lie):
    nats = list(read_booked(folder).nats)
    nats[2] = (lie * float.fromhex(nats[2])).hex()
    rebook(folder, nats=nats)
    with pytest.raises(HonestyError, match=r"chunk 2: costs .* were booked; this is no score"):
        proven(files, text, folder)


@pytest.mark.parametrize("lie", ["nan", "-nan", "inf", "-0x1p+3", "cheap", "0x1p+99999"])
def test_a_booked_price_that_is_no_number_is_refused_whatever_is_drawn(files, text, folder, given, lie):
    """NaN would pass every comparison."""
    nats = list(read_booked(folder).nats)
    rebook(folder, nats=[*nats[:5], lie])
    for nonce in "ab":
        with pytest.raises(DataError, match="books are damaged"):
            proven(files, text, folder, 1, nonce)


def test_honest_books_under_a_lower_claim_are_caught(files, text, scored, given):
    folder, score = scored
    with pytest.raises(HonestyError, match="bits are booked, the score claims"):
        proven(files, text, folder, 1, claimed_bits=0.99 * score.code_length_bits)


def test_a_snapshot_that_is_another_is_caught(files, text, folder, given):
    path = snapshot_path(folder / "snapshots", 4)
    state = read_state(path)
    name = next(name for name in state if name.startswith("weight"))
    place = state[name].view(-1)
    place[0] = torch.nextafter(place[0], torch.tensor(9.0, dtype=place.dtype))
    write_state(path, state)
    booked = read_booked(folder)
    nonce = next(str(n) for n in range(999) if draw(booked, 1, str(n)) == [5])
    with pytest.raises(HonestyError, match="chunk 4: the state at its start"):
        proven(files, text, folder, 1, nonce)


@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_a_damaged_snapshot_is_one_line(files, text, folder, given, damage):
    path = snapshot_path(folder / "snapshots", 4)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "gone":
        path.unlink()
    else:
        write_state(path, {"weight.other": torch.zeros(3)})
    nonce = next(str(n) for n in range(999) if draw(read_booked(folder), 1, str(n)) == [5])
    with pytest.raises((DataError, RecipeError)) as caught:
        proven(files, text, folder, 1, nonce)
    assert "\n" not in str(caught.value)


def test_another_artifact_is_refused_and_so_is_one_that_takes_its_name(files, text, folder, given, tmp_path):
    opened = open_artifact(files[1])
    halves = {name: p.detach().to(torch.float16).numpy() for name, p in opened.model().named_parameters()}
    halves["embedding.weight"] = halves["embedding.weight"] * np.float16(1.01)
    other = tmp_path / "other.fw"
    tokenizer = opened.tokenizer
    seal(other, halves, opened.model_spec, tokenizer.size, tokenizer, {"score": to_plain(SPEC)}, PackSpec())
    with pytest.raises(DataError, match="books are of another artifact or another text"):
        prove_chunks(other, text, SPEC, Run(), folder, 1, "n")
    rebook(folder, artifact_sha256=open_artifact(other).sha256)
    with pytest.raises(HonestyError, match="this is no score"):
        prove_chunks(other, text, SPEC, Run(), folder, CHUNKS, "n")


def test_another_text_is_refused_and_so_is_one_that_takes_its_name(files, text, folder, given):
    tokenizer = open_artifact(files[1]).tokenizer
    other = tokenize(Corpus("valid", (text_of(70_000, 250), text_of(80_001, 250))), tokenizer)
    assert len(other) // 64 == len(text) // 64
    with pytest.raises(DataError, match="books are of another artifact or another text"):
        proven(files, other, folder, 1)
    rebook(folder, text_sha256=other.text_sha256)
    with pytest.raises(HonestyError, match="this is no score"):
        proven(files, other, folder)


def test_a_score_that_peeked_is_caught_by_its_prices(files, text, tmp_path, given, monkeypatch):
    with monkeypatch.context() as patched, Run(tmp_path) as run:
        patched.setattr(EVALUATE, "WindowPredictor", Peeks)
        evaluate(files[1], text, SPEC, run, "adapted")
    with pytest.raises(HonestyError, match=r"chunk 0: costs .* were booked"):
        proven(files, text, tmp_path)


def test_a_score_that_learned_before_it_scored_is_caught(files, text, tmp_path, given, monkeypatch):
    with monkeypatch.context() as patched, Run(tmp_path) as run:
        patched.setattr(EVALUATE, "WindowPredictor", LearnsBeforeItScores)
        evaluate(files[1], text, SPEC, run, "adapted")
    with pytest.raises(HonestyError, match=r"chunk 0: costs .* were booked"):
        proven(files, text, tmp_path)


def test_a_score_that_took_another_step_is_caught_by_the_state(files, text, tmp_path, given, monkeypatch):
    """One step of twice the rate, at chunk 3 of 6."""
    learn = ttt.learning_rate

    with monkeypatch.context() as patched, Run(tmp_path) as run:
        patched.setattr(
            ttt, "learning_rate", lambda spec, chunk, chunks: learn(spec, chunk, chunks) * (1 + (chunk == 3))
        )
        evaluate(files[1], text, SPEC, run, "adapted")
    with pytest.raises(HonestyError, match="chunk 4: the state at its start"):
        proven(files, text, tmp_path)


def test_an_encoded_chunk_that_decodes_to_other_bytes_is_caught(files, text, scored, given, monkeypatch):
    monkeypatch.setattr(chunks, "decode_elsewhere", lambda *_, **__: b"other bytes")
    with pytest.raises(HonestyError, match="decodes to other bytes than the text"):
        proven(files, text, scored[0], 1)


# What cannot be proven chunk by chunk.


def test_a_score_that_was_not_exact_has_no_books(files, text, tmp_path, given):
    spec = replace(SPEC, exact=False, snapshots=0)
    with Run(tmp_path) as run:
        evaluate(files[1], text, spec, run, "adapted")
    with pytest.raises(RecipeError, match=r"score\.exact = true"):
        proven(files, text, tmp_path, 1, spec=spec)


@pytest.mark.parametrize("count", [0, -1, CHUNKS + 1])
def test_more_chunks_than_there_are_cannot_be_proven(files, text, scored, given, count):
    with pytest.raises(RecipeError, match=rf"--chunks {count}: 1 to {CHUNKS} are possible"):
        proven(files, text, scored[0], count)


def test_rolling_chunks_are_refused_since_what_they_see_begins_with_the_text(files, text, given, tmp_path):
    spec = replace(SPEC, windows=rolling.Spec())
    with Run(tmp_path) as run:
        evaluate(files[1], text, spec, run, "adapted")
    with pytest.raises(RecipeError, match=r"rolling.*prove a slice or --full"):
        proven(files, text, tmp_path, 1, spec=spec)


def test_books_of_another_stream_or_damaged_ones_are_refused(files, text, folder, given):
    with pytest.raises(DataError, match="not of this stream"):
        proven(files, text, folder, 1, spec=replace(SPEC, adapt=replace(SPEC.adapt, chunk=32)))
    booked = read_booked(folder)
    rebook(folder, states=booked.states[:-1])
    with pytest.raises(DataError, match="not of this stream"):
        proven(files, text, folder, 1)
    (folder / BOOKED).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        proven(files, text, folder, 1)
    (folder / BOOKED).write_text(json.dumps({**dataclasses.asdict(booked), "nats": 5}))
    with pytest.raises(DataError, match="damaged"):
        proven(files, text, folder, 1)


def test_a_chunk_decodes_from_the_right_state_and_tokens_alone(files, text, scored, given):
    artifact = open_artifact(files[1])
    nonce = next(str(n) for n in range(999) if draw(read_booked(scored[0]), 1, str(n)) == [3])
    proven(files, text, scored[0], 1, nonce)
    (only,) = given
    content, state, before = (only.files[name] for name in ("text.fwc", "state", "before"))
    ends = np.cumsum(artifact.tokenizer.byte_lengths(text.tokens[1:], text.tokens[:-1]))
    assert decode_chunk(artifact, content, state, before, "c") == text.text[ends[191] : ends[255]]
    with pytest.raises(ArtifactError, match="state before it is not the one"):
        decode_chunk(artifact, content, b"", before, "c")
    with pytest.raises(ArtifactError, match="tokens before it"):
        decode_chunk(artifact, content, state, before[:-2], "c")
    with pytest.raises(ArtifactError, match="checksum"):
        decode_chunk(artifact, content, state, before[2:] + before[:2], "c")
    with pytest.raises(ArtifactError, match="damaged"):
        decode_chunk(artifact, content, state[:-8], before, "c")
    with pytest.raises(ArtifactError, match="one chunk of a longer text"):
        decompress(artifact, content)
