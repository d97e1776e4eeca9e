"""`fairway prove`, and the proof that ends every run: no score is written without a file that decodes."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest

from fairway.base.errors import HonestyError
from fairway.score.codec import files as codec_files
from fairway.score.codec import part as codec_part
from tests.score import nearby
from tests.score.cheats import LearnsBeforeItScores, Peeks
from tests.tiny.way import run_tiny

KEYS = {
    *("decoded_equal", "file_bytes", "text_bytes", "bits_per_byte", "ideal_bits"),
    *("gap_percent", "framing_bytes", "updates", "seconds"),
}
QUICK = ("train.schedule.steps=6", "baselines=false", "quant.rounding=nearest")
EXACT = ("score.exact=true", "score.snapshots=2", "score.adapt.chunk=128", "proof_bytes=400")


@pytest.fixture
def given(monkeypatch):
    return nearby.watch(monkeypatch)


@pytest.fixture
def folder(tiny_run, tmp_path):
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory):
    """A run scored in exact mode: eleven chunks or so of 128 targets, a snapshot every second one."""
    folder = tmp_path_factory.mktemp("exact") / "run"
    with pytest.MonkeyPatch.context() as patched:
        nearby.watch(patched)
        run_tiny(folder, *QUICK, *EXACT)
    return folder


@pytest.fixture(scope="module")
def proven_run(tmp_path_factory):
    """A run that proves all of its text, 1,200 bytes, by another process, really."""
    folder = tmp_path_factory.mktemp("proven") / "run"
    run_tiny(folder, *QUICK, "data.source.valid_fraction=0.1", "proof_bytes=8000")
    return folder


def score_of(folder):
    return json.loads((folder / "score.json").read_text())


def facts_of(folder, name):
    rows = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [row for row in rows if row["fact"] == name]


def proof_of(answer):
    assert answer.code == 0, answer.err
    return json.loads(answer.out)


# The proof that ends a run.


def test_a_run_ends_with_the_proof_of_a_slice_in_score_and_journal(proven_run):
    score = score_of(proven_run)
    proof = score["proof"]
    assert set(proof) >= KEYS
    assert proof["decoded_equal"] is True
    assert proof["text_bytes"] == score["text_bytes"] < 8_000, "all of the text, since it is that short"
    assert proof["updates"] >= 2
    assert proof["stage"] == score["result"] == "adapted"
    assert proof["artifact_sha256"] == score["artifact_sha256"]
    assert proof["text_sha256"] == score["text_sha256"]
    assert proof["scored_as"] == "float32"
    assert proof["scored_bits"] == pytest.approx(score["code_length_bits"], rel=1e-6)
    assert proof["ideal_bits"] == pytest.approx(score["code_length_bits"], rel=1e-4)
    assert proof["file_bytes"] == (proven_run / "proof.fwc").stat().st_size
    (fact,) = facts_of(proven_run, "proof")
    assert {key: fact[key] for key in proof} == proof


def test_the_file_of_a_run_decodes_to_the_text_held_out(proven_run, fairway, tmp_path):
    answer = fairway("decompress", proven_run / "proof.fwc", "-a", proven_run / "artifact.fw", "-o", tmp_path / "text")
    assert answer.code == 0
    assert hashlib.sha256((tmp_path / "text").read_bytes()).hexdigest() == score_of(proven_run)["text_sha256"]


@pytest.mark.parametrize("cheat", [Peeks, LearnsBeforeItScores])
def test_a_run_whose_encoder_cheats_ends_without_a_score(exact_run, tmp_path, monkeypatch, cheat):
    """The whole program predicts by cheating; the process that decodes is another, and has nothing to look at."""
    folder = shutil.copytree(exact_run, tmp_path / "run")
    (folder / "score.json").unlink()
    proofs = len(facts_of(folder, "proof"))
    honest = codec_part.predictor_of

    def predictor_of(*arguments):
        one = honest(*arguments)
        return cheat(one.model, one.tape, one.adapter, one.block_tokens, one.carried, one.exact)

    monkeypatch.setattr(codec_part, "predictor_of", predictor_of)
    with pytest.raises(HonestyError, match="does not decode in another process"):
        run_tiny(folder, *QUICK, *EXACT)
    assert not (folder / "score.json").exists()
    assert len(facts_of(folder, "proof")) == proofs, "nothing is booked as proven"


@pytest.mark.parametrize(
    ("forge", "words"),
    [
        (lambda prices: 0.5 * prices, "the prices of all tokens come to"),
        (np.sort, "these tokens cost"),  # the same sum, but the beginning looks cheap
    ],
    ids=["halved", "moved"],
)
def test_a_score_that_its_file_does_not_cost_is_none(folder, fairway, forge, words):
    np.save(folder / "prices.npy", forge(np.load(folder / "prices.npy")))
    answer = fairway("prove", folder, "--slice", "500B")
    assert answer.code == 1
    assert "HonestyError: proof: " in answer.err
    assert words in answer.err
    assert not (folder / "score.json").exists()


def test_a_score_without_its_prices_is_made_again(folder, fairway):
    (folder / "prices.npy").unlink()
    answer = fairway("prove", folder, "--slice", "500B", "--json")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "prices.npy: not there; `fairway score" in answer.err
    assert fairway("score", folder, "--json").code == 0
    assert (folder / "prices.npy").exists()


def test_a_proof_that_is_interrupted_leaves_the_score(folder, fairway, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fairway.steps.closing.prove_slice", interrupted)
    before = (folder / "score.json").read_bytes()
    assert fairway("prove", folder, "--full").code == 130
    assert (folder / "score.json").read_bytes() == before


def test_a_proof_that_fails_is_one_line_and_an_exit_code(folder, fairway, given, monkeypatch):
    assert (folder / "score.json").exists()
    encode = codec_files.encode_part

    def cheating(*arguments, **options):
        with monkeypatch.context() as patched:
            honest = codec_part.predictor_of

            def predictor_of(*those):
                one = honest(*those)
                return Peeks(one.model, one.tape, one.adapter, one.block_tokens, one.carried, one.exact)

            patched.setattr(codec_part, "predictor_of", predictor_of)
            return encode(*arguments, **options)

    monkeypatch.setattr(codec_files, "encode_part", cheating)
    answer = fairway("prove", folder, "--slice", "500B", "--json")
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("HonestyError: proof: the file does not decode in another process (")
    assert answer.err.count("\n") == 1
    assert not (folder / "score.json").exists(), "it claims a score that is none"


def test_a_run_that_goes_on_is_proven_again(exact_run, tmp_path, given):
    """What stands in the run folder could be another's."""
    folder = shutil.copytree(exact_run, tmp_path / "run")
    (folder / "score.json").unlink()
    outcome = run_tiny(folder, *QUICK, *EXACT)
    assert len(given) == 1
    assert outcome.proof["decoded_equal"] is True
    assert score_of(folder)["proof"] == outcome.proof
    assert len(facts_of(folder, "proof")) == 2


def test_a_recipe_may_want_no_proof_and_the_verb_adds_one(tmp_path, fairway, given):
    outcome = run_tiny(tmp_path / "run", *QUICK, "proof_bytes=0")
    assert outcome.proof is None
    assert score_of(tmp_path / "run")["proof"] is None
    assert not given
    proof = proof_of(fairway("prove", tmp_path / "run", "--json"))
    assert score_of(tmp_path / "run")["proof"] == proof


# The verb.


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [(["--slice", "0.6KB"], 600, 690), (["--slice", "300"], 300, 345), (["--full"], 2_300, 2_600)],
    ids=["0.6KB", "300", "full"],
)
def test_prove_says_what_it_saw_and_the_score_takes_it_up(folder, fairway, given, options, least, most):
    score = {**score_of(folder), "proof": None}
    (folder / "score.json").write_text(json.dumps(score))
    proof = proof_of(fairway("prove", folder, *options, "--json"))
    assert set(proof) >= KEYS
    assert proof["decoded_equal"] is True
    assert least <= proof["text_bytes"] <= most
    assert proof["bits_per_byte"] == 8 * proof["file_bytes"] / proof["text_bytes"]
    assert proof["updates"] == (proof["tokens"] - 1) // 256
    assert proof["scored_bits"] == pytest.approx(proof["ideal_bits"], rel=1e-4)
    assert score_of(folder) == {**score, "proof": proof}
    proof_of(fairway("prove", folder, "--slice", "200", "--json"))
    assert score_of(folder)["proof"] == proof, "the score keeps the proof of more text"
    if options == ["--full"]:
        assert proof["text_bytes"] == score["text_bytes"]
        assert proof["tokens"] == proof["of_tokens"] == score["tokens"]
        assert proof["scored_bits"] == pytest.approx(score["code_length_bits"], rel=1e-6)
    assert len(given) == 2


def test_without_a_size_the_slice_is_the_recipes(exact_run, tmp_path, fairway, given):
    folder = shutil.copytree(exact_run, tmp_path / "run")
    proof = proof_of(fairway("prove", folder, "--json"))
    assert {**proof, "seconds": 0, "encode_seconds": 0, "decode_seconds": 0} == {
        **score_of(exact_run)["proof"],
        "seconds": 0,
        "encode_seconds": 0,
        "decode_seconds": 0,
    }, "and the file is the same"


def test_prove_prints_a_table_for_people(folder, fairway, given):
    answer = fairway("prove", folder, "--slice", "300B")
    assert answer.code == 0
    for word in ("text", "file", "ideal", "gap", "scored", "updates", "byte for byte, by another process"):
        assert word in answer.out
    assert re.search(r"updates\s+0\b", answer.out), "300 bytes are less than a chunk"


def test_the_artifact_of_another_run_is_proven_but_is_not_this_score(folder, exact_run, fairway, given):
    """Scored bits are only stated where they are those of this very file; score.json keeps its own proof."""
    before = score_of(folder)
    shutil.copy(exact_run / "artifact.fw", folder / "artifact.fw")
    proof = proof_of(fairway("prove", folder, "--slice", "300B", "--json"))
    assert proof["scored_bits"] is None
    assert proof["artifact_sha256"] != before["artifact_sha256"]
    assert score_of(folder) == before


def test_an_artifact_that_was_changed_after_the_run_makes_no_score(tiny_run, exact_run, tmp_path, given):
    folder = shutil.copytree(exact_run, tmp_path / "run")
    (folder / "score.json").unlink()
    shutil.copy(tiny_run / "artifact.fw", folder / "artifact.fw")
    with pytest.raises(HonestyError, match="not the artifact of this run"):
        run_tiny(folder, *QUICK, *EXACT)
    assert not (folder / "score.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--slice", "8KB", "--full"], "one of --slice, --full and --chunks"),
        (["--full", "--chunks", "2", "--nonce", "n"], "one of --slice, --full and --chunks"),
        (["--chunks", "2"], "--nonce TEXT go together"),
        (["--nonce", "n"], "--nonce TEXT go together"),
        (["--slice", "much"], "--slice much: a size is expected, such as 8KB"),
        (["--slice", "-8KB"], "a size is expected"),
        (["--slice", "0"], "a size is expected"),
        (["--chunks", "2", "--nonce", "n"], "run with score.exact = true"),
    ],
)
def test_what_cannot_be_proven_is_refused_in_one_line(folder, fairway, given, options, words):
    answer = fairway("prove", folder, *options)
    assert answer.code == 2
    assert answer.err.startswith("RecipeError: ")
    assert words in answer.err
    assert answer.err.count("\n") == 1
    assert not given


def test_a_folder_that_is_no_run_is_refused(tmp_path, fairway, given):
    answer = fairway("prove", tmp_path)
    assert answer.code == 2
    assert "recipe.toml is missing" in answer.err


# Chunks.


def test_chunks_of_an_exact_score_are_proven(exact_run, tmp_path, fairway, given):
    folder = shutil.copytree(exact_run, tmp_path / "run")
    proof = proof_of(fairway("prove", folder, "--chunks", 2, "--nonce", "said aloud afterwards", "--json"))
    chunks = -(-score_of(folder)["tokens"] // 128)
    assert proof["decoded_equal"] is True
    assert len(proof["chunks"]) == 2
    assert proof["of_chunks"] == chunks >= 8
    assert proof["catches"] == 2 / chunks
    assert proof["nonce"] == "said aloud afterwards"
    assert proof["booked_bits"] == pytest.approx(score_of(folder)["code_length_bits"], rel=1e-12)
    assert len(given) == 2
    (fact,) = facts_of(folder, "proof_chunks")
    assert fact["chunks"] == proof["chunks"]
    again = fairway("prove", folder, "--chunks", 2, "--nonce", "said aloud afterwards")
    assert re.search(rf"chunks +2 of {chunks} ", again.out)
    assert f"caught with a chance of about {200 / chunks:.1f} %" in again.out
    assert ", ".join(map(str, proof["chunks"])) in again.out


@pytest.mark.parametrize("count", ["99", "-1"])
def test_chunks_out_of_range_are_refused(exact_run, fairway, given, count):
    answer = fairway("prove", exact_run, "--chunks", count, "--nonce", "n")
    assert answer.code == 2
    assert not given


def test_a_lie_in_the_books_is_an_honesty_error(exact_run, tmp_path, fairway, given):
    folder = shutil.copytree(exact_run, tmp_path / "run")
    table = json.loads((folder / "booked.json").read_text())
    table["states"][0] = "0" * 64
    (folder / "booked.json").write_text(json.dumps(table))
    answer = fairway("prove", folder, "--chunks", 1, "--nonce", "n")
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("HonestyError: chunk 0: the state at its start")


def test_the_exact_run_states_both_figures(exact_run):
    score = score_of(exact_run)
    assert score["proof"]["scored_as"] == "exact float64"
    assert score["proof"]["coded_bits"] == pytest.approx(score["proof"]["scored_bits"], rel=1e-6)
    assert 400 <= score["proof"]["text_bytes"] < 460
    (fact,) = facts_of(exact_run, "score_adapted")
    assert fact["exact"] is True
    assert fact["code_length_bits"] == score["code_length_bits"]
    assert [facts_of(exact_run, f"score_{stage}")[0]["exact"] for stage in ("float", "quantized", "sliding")] == [
        False
    ] * 3
