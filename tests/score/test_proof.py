"""The proof of a slice: an honest score decodes in another process, and an encoder that cheats does not."""

import io
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import sentencepiece
import torch

from fairway.artifact import PackSpec, open_artifact, seal
from fairway.base.errors import ArtifactError, DataError, HonestyError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build, to_plain
from fairway.data import Corpus, Tokenizer, Tokens, tokenize
from fairway.model import ModelSpec, build_model
from fairway.score import Proof, ScoreSpec, WindowPredictor, evaluate, prove
from fairway.score import proof as proof_module
from fairway.score.adapt import none, slot
from fairway.score.codec import files as codec_files
from fairway.score.codec import part as codec_part
from fairway.score.evaluate import byte_lengths
from fairway.score.prices import read_prices
from fairway.score.proof import PROOF, slice_of
from fairway.score.windows import plain, rolling

from . import nearby
from .cheats import LearnsBeforeItScores, Peeks
from .conftest import ADAPT, text_of

ISSUE_KEYS = {
    *("decoded_equal", "file_bytes", "text_bytes", "bits_per_byte", "ideal_bits"),
    *("gap_percent", "framing_bytes", "updates", "seconds"),
}
STILL = none.Spec()
WAYS = {  # of being scored, and the updates of a slice of about 365 tokens in chunks of 128
    "adapted": ({}, 2),
    "adapted in lanes": ({"lanes": 2, "windows": plain.Spec()}, 2),
    "adapted, rolling in lanes": ({"lanes": 4, "windows": rolling.Spec()}, 2),
    "sliding": ({"result": "sliding"}, 0),
    "sliding in lanes": ({"result": "sliding", "lanes": 3, "adapt": STILL}, 0),
    "quantized": ({"result": "quantized"}, 0),
    "rolling in lanes": ({"result": "sliding", "lanes": 7, "windows": rolling.Spec(), "adapt": STILL}, 0),
    "slot": ({"adapt": slot.Spec(steps=1, lr=0.01)}, 0),
}


@pytest.fixture(scope="module")
def held_out(files):
    """About 650 targets in two documents."""
    documents = (text_of(70_000, 500), text_of(80_000, 400))
    return tokenize(Corpus("valid", documents), open_artifact(files[1]).tokenizer)


@pytest.fixture(scope="module")
def chosen():
    table = {"windows": {"kind": "sliding", "stride": 16}, "adapt": {**ADAPT, "chunk": 128}}
    return build(ScoreSpec, {"result": "adapted", **table})


@pytest.fixture
def given(monkeypatch):
    return nearby.watch(monkeypatch)


def test_another_process_decodes_a_slice_from_the_artifact_and_the_file_alone(
    files, held_out, chosen, tmp_path, monkeypatch
):
    given = nearby.watch(monkeypatch, here=False)
    with Run(tmp_path) as run:
        proof = prove(files[1], held_out, chosen, run, 500)
    assert proof.decoded_equal
    assert proof.updates == 2
    (only,) = given
    assert only.command[:3] == [sys.executable, "-m", "fairway"]
    assert only.command[3:] == ["decompress", "text.fwc", "-a", "artifact.fw", "-o", "text"]
    assert only.files == {"artifact.fw": files[1].read_bytes(), "text.fwc": (tmp_path / PROOF).read_bytes()}
    assert not any(held_out.text[at : at + 40] in only.files["text.fwc"] for at in range(0, 500, 10))
    assert not only.folder.exists(), "nothing is left behind"
    assert proof.file_bytes == len(only.files["text.fwc"])


@pytest.mark.parametrize(
    ("way", "slice_bytes"), [*((way, 500) for way in WAYS), ("adapted", 0), ("rolling in lanes", 0)]
)
def test_what_is_proven_is_what_was_scored(files, held_out, chosen, given, tmp_path, way, slice_bytes):
    """The slice's integer distributions are, to the last count, those that the whole text was paid by."""
    changes, updates = WAYS[way]
    chosen = replace(chosen, exact=True, **changes)
    with Run(tmp_path) as run:
        scored = evaluate(files[1], held_out, chosen, run, chosen.result)
        prices = read_prices(tmp_path)
        proof = prove(files[1], held_out, chosen, run, slice_bytes, scored, prices)
    lengths = byte_lengths(open_artifact(files[1]), held_out)
    _, taken = slice_of(lengths, chosen, 64, slice_bytes)
    assert proof.decoded_equal
    assert proof.stage == chosen.result
    assert proof.scored_as == "exact float64"
    assert proof.of_tokens == len(lengths)
    assert proof.tokens == len(taken)
    assert proof.text_bytes == int(lengths[taken].sum())
    if slice_bytes:
        assert slice_bytes <= proof.text_bytes < 1.2 * slice_bytes
        assert proof.updates == updates
        assert proof.tokens < proof.of_tokens
    else:
        assert proof.text_bytes == len(held_out.text)
        assert proof.tokens == proof.of_tokens
        assert proof.coded_bits == pytest.approx(scored.code_length_bits, rel=1e-12)
    expected = float(prices[taken].sum(dtype=np.float64)) / np.log(2)
    assert proof.scored_bits == pytest.approx(expected, rel=1e-12)
    assert proof.coded_bits == pytest.approx(proof.scored_bits, rel=1e-6), "booked in float32"
    assert abs(proof.coded_bits - proof.ideal_bits) < 2e-4 * proof.tokens + 4 * 0.0065 * proof.tokens**0.5
    assert 0 <= 8 * (proof.file_bytes - proof.framing_bytes) - proof.coded_bits < 80, "words of one range coder"
    assert 0 < proof.framing_bytes < 400, "the settings are others than those that the artifact names"
    assert proof.bits_per_byte == 8 * proof.file_bytes / proof.text_bytes
    assert proof.gap_percent == pytest.approx(100 * (8 * proof.file_bytes - proof.ideal_bits) / proof.ideal_bits)


def test_a_score_in_float32_and_its_proof_in_float64_are_both_stated(files, held_out, chosen, given, tmp_path):
    with Run(tmp_path) as run:
        scored = evaluate(files[1], held_out, chosen, run, "adapted")
        proof = prove(files[1], held_out, chosen, run, 500, scored, read_prices(tmp_path))
    assert proof.scored_as == "float32"
    assert proof.scored_bits != proof.coded_bits
    assert abs(proof.scored_bits - proof.ideal_bits) < 1e-4 * proof.ideal_bits


def test_without_a_known_score_the_proof_says_so(files, held_out, chosen, given):
    proof = prove(files[1], held_out, chosen, Run(), 300)
    assert proof.scored_bits is None
    assert proof.scored_as is None
    assert proof.decoded_equal


def test_the_report_has_every_figure_of_the_issue(files, held_out, chosen, given):
    plain_ = prove(files[1], held_out, chosen, Run(), 300).plain()
    assert set(plain_) == {field.name for field in fields(Proof)} >= ISSUE_KEYS
    assert plain_["artifact_sha256"] == open_artifact(files[1]).sha256
    assert plain_["text_sha256"] == held_out.text_sha256


@pytest.mark.parametrize(("slice_bytes", "updates"), [(90, 0), (300, 1)])
def test_a_slice_says_how_many_updates_it_spans(files, held_out, chosen, given, slice_bytes, updates):
    """Chunks of 128 tokens; the last one that it reaches is not learned from any more."""
    proof = prove(files[1], held_out, chosen, Run(), slice_bytes)
    assert proof.updates == updates == (proof.tokens - 1) // 128


@pytest.mark.parametrize("lanes", [1, 3])
def test_a_slice_holds_its_bytes_and_is_of_every_lane_the_first(files, held_out, chosen, lanes):
    chosen = replace(chosen, result="sliding", adapt=STILL, lanes=lanes)
    lengths = byte_lengths(open_artifact(files[1]), held_out)
    whole = len(lengths)
    for wanted in (1, 50, 500, 899, 900, 5000):
        stream, taken = slice_of(lengths, chosen, 64, wanted)
        assert stream.whole == whole
        assert lengths[taken].sum() >= min(wanted, 900)
        starts = [int(part[0]) for part in np.array_split(np.arange(whole), lanes)]
        parts = [taken[(taken >= a) & (taken < b)] for a, b in zip(starts, [*starts[1:], whole], strict=True)]
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert all((part == start + np.arange(len(part))).all() for part, start in zip(parts, starts, strict=True))
    with pytest.raises(RecipeError, match="slice of -5 bytes"):
        slice_of(lengths, chosen, 64, -5)


def test_the_decoded_bytes_are_those_of_the_original_text(files, held_out, chosen, given, monkeypatch):
    """Of every lane the first bytes, as they stand in the text: cut here by byte lengths, without a tokenizer."""
    seen = []
    decode = proof_module.decode_elsewhere
    monkeypatch.setattr(proof_module, "decode_elsewhere", lambda *what: seen.append(decode(*what)) or seen[-1])
    for lanes in (1, 5):
        one = replace(chosen, result="sliding", windows=plain.Spec(), adapt=STILL, lanes=lanes)
        lengths = byte_lengths(open_artifact(files[1]), held_out)
        _, taken = slice_of(lengths, one, 64, 333)
        prove(files[1], held_out, one, Run(), 333)
        ends = np.cumsum(lengths)
        pieces = [held_out.text[ends[place] - lengths[place] : ends[place]] for place in taken.tolist()]
        assert seen[-1] == b"".join(pieces)
    assert held_out.text.startswith(seen[0])
    assert not held_out.text.startswith(seen[1])


def test_lanes_may_be_joined_where_a_tokenizer_drops_a_space(tmp_path, given):
    """Documents with BOS between them, of a tokenizer with a dummy prefix: a piece that ended with BOS, joined to one
    that begins with a space, was refused though it was honest (slices of 58 and 61 bytes in 5 lanes)."""
    model = io.BytesIO()
    sentences = iter(text_of(0, 60_000).decode().splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=420,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = Tokenizer.from_bytes(model.getvalue())
    assert tokenizer.drops_first_space
    chosen = ScoreSpec(windows=plain.Spec(), lanes=5)
    table = {"width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "hidden": 16, "context": 32, "bos": tokenizer.bos}
    shape = build(ModelSpec, table)
    weights = {name: p.detach().half().numpy() for name, p in build_model(shape, tokenizer.size, 1).named_parameters()}
    seal(tmp_path / "a.fw", weights, shape, tokenizer.size, tokenizer, {"score": to_plain(chosen)}, PackSpec())
    documents = tuple(b"some words here %d" % number for number in range(40))
    held_out = tokenize(Corpus("valid", documents), tokenizer, "score_decoded")
    for size in range(55, 64):
        assert prove(tmp_path / "a.fw", held_out, chosen, Run(), size).decoded_equal


# More cheats, as those of tests/score/cheats.py.


class SeesItsWindow(WindowPredictor):
    """Not causal: the last target of a window leaks into all its logits."""

    def predict(self, unit):
        for positions, logits in super().predict(unit):
            yield positions, logits + 0.01 * logits.mean(dim=0, keepdim=True)


class LearnsALittleMore(WindowPredictor):
    """Its state leaves the rules' by one bit of one weight, and nothing else."""

    def perceive(self, unit):
        super().perceive(unit)
        weight = self.adapter.learned[0]
        with torch.no_grad():
            weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0, dtype=weight.dtype))


CHEATS = [Peeks, LearnsBeforeItScores, SeesItsWindow, LearnsALittleMore]


def cheating(monkeypatch, cheat):
    """Lets the encoder, and it alone, predict with `cheat`."""
    encode, honest = codec_part.encode_part, codec_part.predictor_of

    def predictor_of(model, tape, stream, chosen, stage, ranks=None):
        one = honest(model, tape, stream, chosen, stage, ranks)
        return cheat(one.model, tape, one.adapter, one.block_tokens, one.carried, one.exact)

    def encode_part(*arguments, **options):
        with monkeypatch.context() as patched:
            patched.setattr(codec_part, "predictor_of", predictor_of)
            return encode(*arguments, **options)

    monkeypatch.setattr(codec_files, "encode_part", encode_part)


@pytest.mark.parametrize("cheat", CHEATS)
def test_an_encoder_that_cheats_makes_no_proof(files, held_out, chosen, given, monkeypatch, cheat):
    cheating(monkeypatch, cheat)
    with pytest.raises(HonestyError, match=r"proof: .*this is no score"):
        prove(files[1], held_out, chosen, Run(), 300)


def test_the_same_encoder_without_a_cheat_does(files, held_out, chosen, given, monkeypatch):
    """The control: what is patched in is not what fails."""
    cheating(monkeypatch, WindowPredictor)
    assert prove(files[1], held_out, chosen, Run(), 300).decoded_equal


def test_the_cheats_would_have_claimed_less(files, held_out, chosen, monkeypatch):
    artifact = open_artifact(files[1])

    def bits(cheat):
        with monkeypatch.context() as patched:
            cheating(patched, cheat)
            return codec_files.encode_part(artifact, held_out.tokens, chosen, "adapted", 500).coded_bits

    assert bits(Peeks) < bits(WindowPredictor)
    assert bits(LearnsBeforeItScores) < bits(WindowPredictor)


def test_a_file_of_another_text_is_no_proof(files, held_out, chosen, given, monkeypatch):
    """It decodes well, to as many bytes; but they are not those of the text."""
    artifact, encoding = open_artifact(files[1]), codec_files.encoding
    lengths = byte_lengths(artifact, held_out)
    alike = np.flatnonzero(lengths[:50] == 1)
    tokens = held_out.tokens.copy()
    other = next(int(place) for place in alike[1:] if tokens[1 + place] != tokens[1 + alike[0]])
    tokens[[1 + alike[0], 1 + other]] = tokens[[1 + other, 1 + alike[0]]]

    def swapped(_, *rest):
        return encoding(tokens, *rest)

    monkeypatch.setattr("fairway.score.proof.encoding", swapped)
    at = int(lengths[: alike[0]].sum())
    with pytest.raises(HonestyError, match=rf"decoded to other bytes than the text from byte {at} of 900"):
        prove(files[1], held_out, replace(chosen, result="quantized"), Run(), 0)


def test_another_artifact_beside_the_file_does_not_decode_it(files, held_out, chosen, given, monkeypatch, tmp_path):
    other = tmp_path / "other.fw"
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    other.write_bytes(content)
    decode = proof_module.decode_elsewhere
    monkeypatch.setattr(proof_module, "decode_elsewhere", lambda path, *rest: decode(other, *rest))
    with pytest.raises(HonestyError, match="does not decode in another process"):
        prove(files[1], held_out, chosen, Run(), 300)
    with pytest.raises(ArtifactError):
        prove(other, held_out, chosen, Run(), 300)


def test_a_text_that_is_not_the_tokens_is_refused(files, held_out, chosen, given):
    with pytest.raises(DataError, match=r"token \d+ at position \d+ is counted as"):
        prove(files[1], Tokens.of(held_out.tokens, "valid", held_out.text[:-1] + b"\x00"), chosen, Run(), 300)
    assert not given, "nothing was decoded"
