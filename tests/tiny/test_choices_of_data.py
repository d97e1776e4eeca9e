"""The choices of data, the whole way: case transform, packed documents kept apart; the package, the scripts."""

import json

import pytest

from fairway.artifact import open_artifact
from fairway.base.errors import RecipeError
from fairway.data.cased import Cased
from tests.lab.test_scripts import alone
from tests.tiny.way import SAMPLE, run_tiny

CHOICES = (
    "data.tokenizer.transform=case",
    "data.loader=documents",
    "data.source.separator=\n\n",
    "model.apart=true",
    "score.result=sliding",
    "score.adapt=none",
    "train.schedule.steps=12",
    "baselines=false",
    "proof_bytes=0",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices") / "run"
    return run_tiny(folder, *CHOICES), folder


def test_the_score_divides_by_the_original_text(made):
    outcome, folder = made
    artifact, score = open_artifact(folder / "artifact.fw"), json.loads((folder / "score.json").read_text())
    assert type(artifact.tokenizer) is Cased
    assert artifact.model_spec.apart
    assert score["text_bytes"] == SAMPLE.stat().st_size // 5
    assert not score["decoded_text"]
    assert outcome.bits_per_byte == score["code_length_bits"] / score["text_bytes"]


def test_the_scripts_alone_give_the_same(made, tmp_path):
    outcome, folder = made
    done = alone(
        (folder / "score.py").read_bytes(), tmp_path / "score", folder / "artifact.fw", "--device", "cpu", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bits_per_byte"] == outcome.bits_per_byte
    done = alone((folder / "train_gpt.py").read_bytes(), tmp_path / "train", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (again,) = (tmp_path / "train" / "runs").iterdir()
    assert (again / "artifact.fw").read_bytes() == (folder / "artifact.fw").read_bytes()


def test_any_text_goes_through_its_codec(made, tmp_path, fairway):
    _, folder = made
    (tmp_path / "text").write_bytes("NATO and the iPhone \ue002 McDonald \ue001A".encode() + b"\xff")
    fairway("compress", tmp_path / "text", "-a", folder / "artifact.fw", "-o", tmp_path / "small")
    fairway("decompress", tmp_path / "small", "-a", folder / "artifact.fw", "-o", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == (tmp_path / "text").read_bytes()


def test_the_model_and_the_tokenizer_must_mean_the_same_bos(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.bos = 2: the tokenizer's is 1"):
        run_tiny(tmp_path / "run", "model.bos=2")
