"""A file and a text -> bits per byte, on a small model in a real file."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fairway.artifact import open_artifact
from fairway.base.errors import BudgetError, DataError, RecipeError
from fairway.base.journal import Run
from fairway.base.specs import build
from fairway.data import Tokens
from fairway.score import ScoreSpec, distributions, evaluate, sample, score_text, spec_of

from .conftest import text_of


@pytest.fixture(scope="module")
def scores(files, held_out, spec):
    run = Run()
    found = {
        stage: evaluate(files[0] if stage == "float" else files[1], held_out, spec, run, stage) for stage in spec.stages
    }
    return found, run


def test_every_stage_pays_each_target_once_and_divides_by_the_bytes_of_the_text(scores, held_out):
    found, run = scores
    assert list(found) == ["float", "quantized", "sliding", "adapted"]
    for stage, score in found.items():
        assert score.text_bytes == len(held_out.text) == 1_900
        assert score.tokens == len(held_out.tokens) - 1
        assert score.bits_per_byte == score.code_length_bits / 1_900
        assert run.facts[f"score_{stage}"]["bits_per_byte"] == score.bits_per_byte
        assert score.seconds > 0


def test_context_and_learning_pay_off(scores):
    bpb = {stage: score.bits_per_byte for stage, score in scores[0].items()}
    assert bpb["adapted"] < bpb["sliding"] < bpb["quantized"] < 8
    assert bpb["quantized"] == pytest.approx(bpb["float"], abs=0.005)
    assert bpb["quantized"] != bpb["float"], "the two stages must open two files"


def test_the_quantized_stage_is_the_cross_entropy_of_non_overlapping_windows(scores, files, held_out):
    model = open_artifact(files[1]).model()
    x = torch.from_numpy(held_out.tokens.astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(x) - 1, 64):
            inputs, targets = x[start : start + 64][: len(x) - 1 - start], x[start + 1 : start + 65]
            hidden, _ = model(inputs[None])
            nats += float(F.cross_entropy(model.logits(hidden)[0].double(), targets, reduction="sum"))
    assert scores[0]["quantized"].code_length_bits == pytest.approx(nats / math.log(2), rel=1e-6)


def test_scoring_twice_gives_the_same_digits(scores, files, held_out, spec):
    again = evaluate(files[1], held_out, spec, Run(), "adapted")
    assert again.code_length_bits == scores[0]["adapted"].code_length_bits


@pytest.mark.parametrize("change", [{"block_tokens": 64}, {"block_tokens": 1000}])
def test_the_block_size_is_memory_only(scores, files, held_out, spec, change):
    again = evaluate(files[1], held_out, dataclasses.replace(spec, **change), Run(), "adapted")
    assert again.bits_per_byte == pytest.approx(scores[0]["adapted"].bits_per_byte, abs=1e-6)


def test_the_temperature_of_the_recipe_divides_the_logits(files, held_out, spec):
    warm = evaluate(files[1], held_out, dataclasses.replace(spec, temperature=1000.0), Run(), "quantized")
    vocab = open_artifact(files[1]).vocab
    uniform = warm.tokens * math.log2(vocab) / warm.text_bytes
    assert warm.bits_per_byte == pytest.approx(uniform, rel=0.002)


def test_the_last_token_counts(files, held_out, spec):
    """Text whose last window is one target long."""
    count = 64 * 4 + 2
    artifact = open_artifact(files[1])
    tokens = held_out.tokens[:count]
    text = artifact.tokenizer.decode(tokens[1:], previous=int(tokens[0]))
    score = evaluate(files[1], Tokens.of(tokens, "valid", text), spec, Run(), "quantized")
    assert score.tokens == count - 1


def test_a_text_shorter_than_one_window_is_scored(files, spec):
    score = score_text(open_artifact(files[1]), b"import os\n")
    assert score.stage == "adapted"
    assert score.text_bytes == 10
    assert 0 < score.bits_per_byte < 20


def test_an_empty_text_is_refused(files):
    with pytest.raises(DataError, match="0 bytes: nothing to score"):
        score_text(open_artifact(files[1]), b"")


def test_a_text_without_bytes_is_refused(files, held_out, spec):
    with pytest.raises(DataError, match="nothing to score"):
        evaluate(files[1], Tokens.of(held_out.tokens[:1], "valid", b""), spec, Run(), "quantized")


def test_a_byte_table_that_disagrees_is_refused(files, held_out, spec):
    padded = Tokens.of(held_out.tokens, "valid", held_out.text + b"!")
    with pytest.raises(DataError, match=r"counts 1,900 bytes, the text has 1,901"):
        evaluate(files[1], padded, spec, Run(), "quantized")


def test_tokens_of_another_text_are_refused(files, held_out, spec):
    other = Tokens.of(held_out.tokens, "valid", held_out.text[:-1] + b"\x00")
    with pytest.raises(DataError, match=r"token \d+ at position \d+ is counted as \d bytes, but the text has"):
        evaluate(files[1], other, spec, Run(), "quantized")


def test_a_token_outside_the_vocabulary_is_refused(files, held_out, spec):
    tokens = held_out.tokens.copy()
    tokens[5] = 999
    with pytest.raises(DataError, match="token 999: the artifact's vocabulary has 320"):
        evaluate(files[1], Tokens.of(tokens, "valid", held_out.text), spec, Run(), "quantized")


def test_a_result_that_will_be_late_is_stopped_early(files, held_out, spec):
    with pytest.raises(BudgetError, match=r"budget\.eval_seconds") as caught:
        evaluate(files[1], held_out, spec, Run(), "adapted", limit=1e-6)
    assert "projected" in str(caught.value)


def test_the_adapted_stage_needs_a_technique(files, held_out):
    with pytest.raises(RecipeError, match="adapt"):
        evaluate(files[1], held_out, ScoreSpec(), Run(), "adapted")
    with pytest.raises(RecipeError, match='result = "adapted"'):
        build(ScoreSpec, {"result": "adapted"})


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"temperature": -1.0}, {"context": -1}, {"block_tokens": 0}, {"result": "best"}]
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        build(ScoreSpec, wrong)


def test_the_file_says_how_it_is_scored(files, spec):
    assert spec_of(open_artifact(files[1])) == spec


def test_the_distributions_are_those_that_were_paid(files):
    artifact, text = open_artifact(files[0]), text_of(90_000, 700)
    tokens, chances = distributions(artifact, text)
    assert chances.shape == (len(tokens) - 1, artifact.vocab)
    assert float((chances.exp().sum(1) - 1).abs().max()) < 1e-12
    paid = -chances[torch.arange(len(chances)), torch.from_numpy(tokens[1:].astype(np.int64))].sum()
    assert float(paid) / math.log(2) == pytest.approx(score_text(artifact, text).code_length_bits, rel=1e-12)


def test_sampling_repeats_with_its_seed_and_leaves_the_context_behind(files):
    artifact = open_artifact(files[1])
    one = "".join(sample(artifact, "def ", 150, 0.9, seed=3))  # 150 tokens in a context of 64
    assert one == "".join(sample(artifact, "def ", 150, 0.9, seed=3))
    assert one != "".join(sample(artifact, "def ", 150, 0.9, seed=4))


def test_cold_sampling_takes_the_likeliest_token(files):
    artifact = open_artifact(files[1])
    tokens = [artifact.tokenizer.bos, *artifact.tokenizer.encode(b"import ").tolist()]
    model, written = artifact.model(), []
    for _ in range(8):
        hidden, _ = model(torch.tensor([tokens + written]))
        written.append(int(model.logits(hidden, last=1).argmax()))
    expected = artifact.tokenizer.decode(written, previous=tokens[-1]).decode("utf-8", "replace")
    assert "".join(sample(artifact, "import ", 8, 0.0)) == expected


def test_an_impossible_temperature_is_refused_before_anything_is_drawn(files):
    with pytest.raises(RecipeError, match="temperature"):
        sample(open_artifact(files[1]), "a", 3, -1.0)
