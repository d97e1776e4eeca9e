"""The n-gram tilt against a plain count, the entropy temperature against its formula, and files that are made so."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from fairway.artifact import PackSpec, open_artifact, seal
from fairway.artifact.bundle import unpacked
from fairway.base.errors import ArtifactError, RecipeError
from fairway.base.journal import Run
from fairway.base.slots import technique
from fairway.base.specs import build, to_plain
from fairway.data import Corpus, tokenize
from fairway.lab.submit.export import score_script
from fairway.recipe import Recipe, load
from fairway.score import ScoreSpec, compress, decompress, evaluate, probe, prove, prove_chunks, settings_for, spec_of
from fairway.score.codec.format import pack, read_header, read_segments
from fairway.score.prices import read_prices
from fairway.score.reshape import entropy_temperature
from fairway.score.reshape.ngram_tilt import Lane, Level, Spec, reshape
from fairway.score.reshaping import NOTHING, Hints
from fairway.score.windows import plain, rolling
from tests.tiny.way import run_tiny

from . import nearby
from .conftest import ADAPT, text_of

SHORT = Spec(levels=(Level((6, 4), 0.5, 1), Level((3, 2), 0.6, 2)), beta=1.5)
BOTH = (SHORT, entropy_temperature.Spec(certain=0.9, uniform=1.1))


@pytest.fixture
def given(monkeypatch):
    return nearby.watch(monkeypatch)


# The tilt, by a plain count


def by_counting(tokens: list[int], spec: Spec) -> tuple[int, float]:
    """The hint after some tokens: every earlier place is looked at, and nothing is kept."""
    for level in spec.levels:
        for order in level.orders:
            if order > len(tokens):
                continue
            places = [i for i in range(order, len(tokens)) if tokens[i - order : i] == tokens[-order:]]
            followers = [tokens[i] for i in places]
            if not followers:
                continue
            most = max(followers.count(token) for token in followers)
            best = next(token for token in reversed(followers) if followers.count(token) == most)
            if len(followers) >= level.count and most / len(followers) >= level.confidence:
                return best, spec.beta * (most / len(followers) if spec.scaled else 1.0)
    return NOTHING


def hints(tokens, spec):
    lane, found = Lane(spec), []
    for token in tokens:
        lane.perceive_token(token)
        found.append(lane.hint())
    return found


SPECS = (
    SHORT,
    Spec(),
    Spec(levels=(Level((2, 1), 0.4, 1),), scaled=False, beta=2.625),
    Spec(levels=(Level((3,), 0.9, 3), Level((1,), 0.3, 2))),
)


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
@settings(max_examples=60, deadline=None)
@drawn(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_a_hint_is_what_a_plain_count_of_all_earlier_places_says(spec, tokens):
    found = hints(tokens, spec)
    assert found == [by_counting(tokens[: i + 1], spec) for i in range(len(tokens))]


def test_it_is_so_on_a_text_that_repeats_itself():
    random = np.random.default_rng(0)
    phrases = random.integers(0, 65_536, (4, 25)).tolist()
    tokens = [token for i in random.integers(0, 4, 12) for token in phrases[i]]
    for spec in SPECS:
        found = hints(tokens, spec)
        assert found == [by_counting(tokens[: i + 1], spec) for i in range(len(tokens))]
        assert sum(hint != NOTHING for hint in found) > 50


def test_a_hint_changes_nothing_and_is_there_before_its_token():
    lane = Lane(SHORT)
    for token in [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3]:
        assert lane.hint() == lane.hint()
        lane.perceive_token(token)
    assert lane.hint().token == 4


@pytest.mark.parametrize(("beta", "scaled"), [(2.0, True), (2.625, False), (0.0, True)])
def test_the_price_is_that_of_the_closed_form(beta, scaled):
    """nll' = nll + ln(1 + p(hint) (e^beta - 1)) - beta [y = hint]."""
    random = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(200, 37, generator=random, dtype=torch.float64)
    told = torch.randint(0, 37, (200,), generator=random)
    share = torch.rand(200, generator=random, dtype=torch.float64) if scaled else torch.ones(200, dtype=torch.float64)
    target = torch.where(torch.arange(200) % 3 == 0, told, torch.randint(0, 37, (200,), generator=random))
    before, rows = torch.log_softmax(logits, 1), torch.arange(200)
    after = torch.log_softmax(reshape(logits, Hints(told, beta * share), Spec()), 1)
    mass = before[rows, told].exp()
    expected = -before[rows, target] + (mass * (torch.exp(beta * share) - 1)).log1p() - beta * share * (target == told)
    torch.testing.assert_close(-after[rows, target], expected, atol=1e-12, rtol=0)


def test_memory_is_bounded_and_what_is_met_again_is_kept():
    """By a list of contexts in the order in which they were seen last: two generations of `most` / 2."""
    spec = Spec(levels=(Level((2, 1), 0.1, 1),), most=40)
    lane, tokens = Lane(spec), [7, 8]
    for token in tokens:
        lane.perceive_token(token)
    for token in range(100, 400):
        for one in (token, 7, 8):
            lane.perceive_token(one)
            assert len(lane.young) + len(lane.old) <= spec.most
        assert not set(lane.young) & set(lane.old)
    lane.perceive_token(7)
    assert lane.hint().token == 8, "met all the time"
    for token in (100, 7):
        lane.perceive_token(token)
    assert lane.hint().token == 8, "(100, 7) is forgotten, the shorter context is not"
    assert (lane.young | lane.old)[(7).to_bytes(2, "little")].total > 300


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"levels": []}, "orders none"),
        ({"levels": [{"orders": [4, 8], "confidence": 0.5, "count": 1}]}, "orders 4, 8; each once, longest first"),
        ({"levels": [{"orders": [33], "confidence": 0.5, "count": 1}]}, "contexts of 1 to 32 tokens"),
        ({"levels": [{"orders": [3], "confidence": 1.5, "count": 1}]}, "confidence = 1.5"),
        ({"beta": -1.0}, "beta = -1.0"),
        ({"beta": math.nan}, "beta = nan"),
        ({"most": 1}, "most = 1"),
        ({"level": []}, "unknown"),
    ],
)
def test_impossible_values_are_refused_with_their_place(table, says):
    with pytest.raises(RecipeError, match=says):
        build(ScoreSpec, {"reshape": [{"kind": "ngram_tilt", **table}]})


# The temperature


def test_the_temperature_is_that_of_the_formula():
    logits = np.array([[0.0, 0.0, 0.0, 0.0], [60.0, 0.0, 0.0, 0.0], [1.0, 2.0, -1.0, 0.5]])
    found = entropy_temperature.reshape(torch.from_numpy(logits), entropy_temperature.Spec(0.5, 2.0)).numpy()
    for row, new in zip(logits, found, strict=True):
        chances = np.exp(row) / np.exp(row).sum()
        entropy = -(chances * np.log(chances)).sum()
        np.testing.assert_allclose(new, row / (0.5 + 1.5 * entropy / np.log(4)), atol=1e-12)
    assert found[1, 0] == pytest.approx(120, abs=1e-6), "no doubt: T = certain"
    one = entropy_temperature.reshape(torch.from_numpy(logits), entropy_temperature.Spec(0.7, 0.7)).numpy()
    np.testing.assert_allclose(one, logits / 0.7, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, 11.0])
def test_a_temperature_that_is_none_is_refused(value):
    with pytest.raises(RecipeError, match="a temperature from"):
        build(ScoreSpec, {"reshape": [{"kind": "entropy_temperature", "uniform": value}]})


# Files


@pytest.fixture(scope="module")
def held_out(files):
    documents = (text_of(70_000, 500), text_of(80_000, 400))
    return tokenize(Corpus("valid", documents), open_artifact(files[1]).tokenizer)


def exactly(**changes) -> ScoreSpec:
    table = {"windows": {"kind": "sliding", "stride": 16}, "adapt": {**ADAPT, "chunk": 128}}
    return replace(build(ScoreSpec, {"result": "adapted", **table}), exact=True, reshape=BOTH, **changes)


@pytest.mark.parametrize(
    ("changes", "slice_bytes"),
    [
        ({}, 400),
        ({"result": "sliding"}, 400),
        ({"lanes": 2, "windows": plain.Spec()}, 0),
        ({"lanes": 4, "windows": rolling.Spec()}, 400),
    ],
    ids=["adapted", "sliding", "plain lanes, all of it", "rolling lanes"],
)
def test_what_is_proven_is_what_was_scored(files, held_out, given, tmp_path, changes, slice_bytes):
    spec = exactly(**changes)
    with Run(tmp_path) as run:
        scored = evaluate(files[1], held_out, spec, run, spec.result)
        proof = prove(files[1], held_out, spec, run, slice_bytes, scored, read_prices(tmp_path))
    assert proof.decoded_equal
    assert proof.coded_bits == pytest.approx(proof.scored_bits, rel=1e-6)
    still = evaluate(files[1], held_out, replace(spec, reshape=()), Run(), spec.result)
    assert abs(scored.code_length_bits - still.code_length_bits) > 10, "and the techniques did something"


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_chunk_is_proven_with_all_that_its_lane_has_shown(files, held_out, given, tmp_path, lanes):
    """The table is no part of the state: it is told again, by the tokens before the chunk."""
    spec = replace(exactly(windows=plain.Spec()), lanes=lanes, snapshots=2)
    with Run(tmp_path) as run:
        score = evaluate(files[1], held_out, spec, run, "adapted")
    proof = prove_chunks(files[1], held_out, spec, Run(), tmp_path, 3, "n", score.code_length_bits)
    assert proof.decoded_equal
    assert len(proof.chunks) == len(given) == 3
    for chunk, files_there in zip(proof.chunks, given, strict=True):
        before = np.frombuffer(files_there.files["before"], "<u2")
        assert len(before) == 128 * chunk
        assert set(files_there.files) == {"artifact.fw", "text.fwc", "state", "before"}
        if lanes == 1:
            assert before.tolist() == held_out.tokens[1 : 1 + 128 * chunk].tolist()


@pytest.fixture(scope="module")
def tilted(files, tmp_path_factory):
    """The same model in a file that names both techniques."""
    source, path = open_artifact(files[1]), tmp_path_factory.mktemp("tilted") / "artifact.fw"
    score = to_plain(replace(exactly(), exact=False))
    seal(path, source.tensors, source.model_spec, source.vocab, source.tokenizer, {"score": score}, PackSpec())
    return open_artifact(path)


@pytest.mark.parametrize(("adapt", "lanes"), [(False, 1), (False, 3), (True, 1)])
def test_text_comes_back_from_a_file_that_is_reshaped(tilted, adapt, lanes):
    spec, text = settings_for(tilted, adapt, lanes), text_of(70_000, 400) + "Straße 漢字 🦊\n".encode() * 3
    assert spec.reshape == BOTH
    coded = compress(tilted, text, spec)
    assert decompress(tilted, coded.content) == text
    plainly = compress(tilted, text, replace(spec, reshape=()))
    assert decompress(tilted, plainly.content) == text, "what differs from the artifact stands in the header"
    assert coded.coded_bits < plainly.coded_bits - 50


def test_a_header_cannot_ask_for_any_number_of_techniques(tilted):
    spec = settings_for(tilted, False, 1)
    coded = compress(tilted, b"The same again, the same again.", spec)
    header, start = read_header(coded.content, "file")
    segments = read_segments(coded.content, start, header, "file")
    still = to_plain(ScoreSpec(reshape=(Spec(beta=0.0),)))["reshape"]
    for asked, says in ((still * 9, "9 techniques; at most 8"), (["ngram_tilts"], "ngram_tilts")):
        forged = pack(replace(header, settings={**header.settings, "reshape": asked}), segments)
        with pytest.raises(ArtifactError, match=says):
            decompress(tilted, forged)


def test_the_probe_finds_nothing_in_a_file_that_is_reshaped(tilted, held_out):
    spec = replace(exactly(), exact=False)
    for report in probe(tilted.path, held_out, spec, Run(), flips=4):
        assert report.honest, report.worst


def test_a_script_holds_what_its_recipe_names_alone():
    for named in ((), ("ngram_tilt",)):
        specs = tuple(technique("fairway.score.reshape", kind).Spec() for kind in named)
        script = score_script(replace(Recipe("one"), score=ScoreSpec(reshape=specs)))
        modules = unpacked(script.decode())[1]
        for name in ("reshaping", "reshape.ngram_tilt"):
            assert (f"fairway.score.{name}" in modules) == bool(named)
        assert "fairway.score.reshape.entropy_temperature" not in modules


def test_a_whole_run_is_reshaped_scored_and_proven(tiny_run, tmp_path):
    levels = "[{orders = [4, 3], confidence = 0.5, count = 1}, {orders = [2], confidence = 0.5, count = 2}]"
    named = f'[{{kind = "ngram_tilt", levels = {levels}, beta = 1.0}}, "entropy_temperature"]'
    run_tiny(tmp_path / "run", f"score.reshape={named}", "baselines=false", "proof_bytes=1000")
    found, before = (json.loads((folder / "score.json").read_text()) for folder in (tmp_path / "run", tiny_run))
    assert found["proof"]["decoded_equal"]
    assert abs(found["proof"]["scored_gap_percent"]) < 0.5
    for stage, same in {"float": True, "quantized": True, "sliding": False, "adapted": False}.items():
        assert (found["stages"][stage] == before["stages"][stage]) == same
    spec = spec_of(open_artifact(tmp_path / "run" / "artifact.fw"))
    assert spec.reshape == load(str(tmp_path / "run" / "recipe.toml")).score.reshape
    assert spec.reshape[0].levels[1] == Level((2,), 0.5, 2)
