"""What a score leaves per document and along the text: it adds up to the score, on any number of ranks, and is made
again where it is missing."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fairway.artifact import open_artifact
from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks, in_threads
from fairway.score import evaluate
from fairway.score.ledger import Ledger
from fairway.score.prices import read_prices
from fairway.score.profile import PROFILE, Keeper, packed, read_profile


@pytest.fixture(scope="module")
def kept(files, held_out, spec, tmp_path_factory):
    """(folder, {stage: score}): every stage of a text of two documents."""
    folder = tmp_path_factory.mktemp("kept")
    with Run(folder) as run:
        keep = Keeper(run)
        scores = {s: evaluate(files[s != "float"], held_out, spec, run, s, keep=keep) for s in spec.stages}
    return folder, scores


def test_documents_and_buckets_add_up_to_the_code_length_of_every_stage(kept, held_out):
    folder, scores = kept
    profile = read_profile(folder)
    assert list(profile.stages) == ["float", "quantized", "sliding", "adapted"]
    for stage, score in scores.items():
        bits = profile.stages[stage]
        assert bits.documents.sum() == pytest.approx(score.code_length_bits, rel=1e-12)
        assert bits.buckets.sum() == pytest.approx(score.code_length_bits, rel=1e-12)
        assert bits.artifact_sha256 == score.artifact_sha256
    for counts in (profile.documents[1:], profile.buckets):
        assert counts.sum(axis=1).tolist() == [len(held_out) - 1, held_out.text_bytes]


def test_a_document_begins_with_its_bos(kept, files, held_out):
    """Against the tokens and the prices themselves: the second document's bits include those of its BOS."""
    folder, _ = kept
    profile, prices = read_profile(folder), read_prices(folder)
    second = int(np.flatnonzero(held_out.tokens[1:] == open_artifact(files[1]).tokenizer.bos)[0])
    assert profile.documents[0].tolist() == [0, second]
    assert profile.documents[2].tolist() == [1_000, 900], "bytes of each document"
    bits = prices.astype(np.float64) / np.log(2)
    expected = [bits[:second].sum(), bits[second:].sum()]
    np.testing.assert_allclose(profile.stages["adapted"].documents, expected, rtol=1e-6)


def test_a_target_is_of_the_bucket_that_its_first_byte_lies_in(kept, files, held_out):
    """Counted one by one, by decoding."""
    profile, prices, tokenizer = read_profile(kept[0]), read_prices(kept[0]), open_artifact(files[1]).tokenizer
    expected, place = np.zeros((3, 200)), 0
    for before, token, nats in zip(held_out.tokens[:-1], held_out.tokens[1:], prices, strict=True):
        size = len(tokenizer.decode([token], previous=int(before)))
        expected[:, min(199, place * 200 // held_out.text_bytes)] += [1, size, nats / np.log(2)]
        place += size
    assert (profile.buckets == expected[:2]).all()
    np.testing.assert_allclose(profile.stages["adapted"].buckets, expected[2], rtol=1e-6)


def test_the_sample_is_the_text_with_its_prices(kept, held_out):
    profile, prices = read_profile(kept[0]), read_prices(kept[0])
    assert profile.sample.tolist() == held_out.tokens[1:301].tolist()
    assert held_out.text.startswith(b"".join(profile.pieces))
    assert "".join(profile.texts) == b"".join(profile.pieces).decode()
    np.testing.assert_allclose(profile.stages["adapted"].sample * np.log(2), prices[:300], rtol=1e-6)


def test_several_ranks_keep_what_one_does(files, held_out, tmp_path):
    """Each pays a part; the first writes the whole."""
    artifact, nats = open_artifact(files[1]), np.random.default_rng(0).exponential(2.0, len(held_out) - 1)
    lengths = artifact.tokenizer.byte_lengths(held_out.tokens[1:], held_out.tokens[:-1])

    def score(ranks, folder):
        ledger = Ledger(len(nats))
        mine = np.arange(len(nats))[ranks.share(len(nats))]
        ledger.pay(mine, nats[mine])
        ledger.settle(ranks)
        with Run(folder if ranks.first else None, ranks) as run:
            Keeper(run)("sliding", ledger, held_out, lengths, artifact)

    score(Ranks(), tmp_path / "one")
    in_threads(3, lambda ranks: score(ranks, tmp_path / "three"))
    one, three = (read_profile(tmp_path / name).stages["sliding"] for name in ("one", "three"))
    assert one.documents.sum() == pytest.approx(nats.sum() / np.log(2), rel=1e-12)
    for part in ("documents", "buckets", "sample"):
        np.testing.assert_allclose(getattr(three, part), getattr(one, part), rtol=1e-12)


def test_a_finished_run_from_before_gets_its_profile_by_being_scored_again(tiny_run, tmp_path, fairway):
    """And what is kept is known: its scores stay in the facts that a resumed run begins with."""
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    before = read_profile(folder)
    with Run(folder) as run:
        Keeper(run)
        assert {f"score_{stage}" for stage in before.stages} <= set(run.facts)
    (folder / PROFILE).unlink()
    with Run(folder) as run:
        Keeper(run)
        assert not any(name.startswith("score_") for name in run.facts)
    answer = fairway("score", folder, "--device", "cpu", "--json")
    assert answer.code == 0, answer.err
    after = read_profile(folder)
    assert json.loads(answer.out)["stages"] == json.loads((tiny_run / "score.json").read_text())["stages"]
    for stage, bits in before.stages.items():
        assert (after.stages[stage].documents == bits.documents).all()


@pytest.mark.parametrize("change", [lambda data: data[:200], lambda data: b"no zip", lambda data: b""])
def test_a_damaged_profile_is_one_line(kept, tmp_path, change):
    (tmp_path / PROFILE).write_bytes(change((kept[0] / PROFILE).read_bytes()))
    with pytest.raises(DataError, match="no profile of a score") as caught:
        read_profile(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_profile_is_small(kept):
    """Fifty thousand documents, four stages: about 2 MB."""
    drawn = np.random.default_rng(0)
    profile = read_profile(kept[0])
    documents = np.stack([np.arange(50_000), *drawn.integers(1, 5_000, (2, 50_000))])
    stages = {s: replace(b, documents=drawn.gamma(2, 900, 50_000)) for s, b in profile.stages.items()}
    assert len(packed(replace(profile, documents=documents, stages=stages))) < 2_500_000
