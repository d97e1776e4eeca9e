"""The exported scripts: the same bits as the package, alone; what the environment may say; what they hold."""

import copy
import json
import os
import subprocess
import sys

import pytest

from fairway.artifact.bundle import unpacked
from fairway.base.errors import RecipeError
from fairway.base.specs import build, to_plain
from fairway.lab.submit import checkout, score_script, train_script
from fairway.lab.submit.export import needs, requirements, techniques
from fairway.recipe import Recipe, load
from fairway.script import training
from fairway.script.environment import overridden
from tests.tiny.way import SAMPLE, TINY, run_tiny

ALONE = {name: os.environ[name] for name in ("PATH", "HOME", "SYSTEMROOT") if name in os.environ} | {
    "OMP_NUM_THREADS": "1"
}


@pytest.fixture(scope="module")
def b6():
    return load("b6")


def alone(script, place, *words, **said):
    """A script in an empty folder, without this package's environment."""
    place.mkdir(exist_ok=True)
    (place / "script.py").write_bytes(script)
    command = [sys.executable, "-I", "script.py", *map(str, words)]
    return subprocess.run(command, cwd=place, env=ALONE | said, capture_output=True, text=True, timeout=120)


def test_train_gpt_goes_the_whole_way_to_the_score_of_the_package(tiny_run, tmp_path):
    """Text to score by one file: the artifact, every loss and the score are those of `fairway run`, to the last bit."""
    script = (tiny_run / "train_gpt.py").read_bytes()
    done = alone(script, tmp_path / "empty", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "empty" / "runs").iterdir()
    assert (made / "artifact.fw").read_bytes() == (tiny_run / "artifact.fw").read_bytes()
    losses = [
        [json.loads(row)["loss"] for row in (at / "curves.jsonl").read_text().splitlines()] for at in (made, tiny_run)
    ]
    assert losses[0] == losses[1]
    score = json.loads((tiny_run / "score.json").read_text())
    lines = done.stdout.splitlines()
    assert lines[-1] == f"final val_bpb:{score['bits_per_byte']:.8f} (adapted)"
    assert f"step:60 train_loss:{losses[0][-1]:.6f}" in done.stdout
    for stage, value in score["stages"].items():
        assert any(line.startswith(f"{stage} val_loss:") and f"val_bpb:{value:.8f}" in line for line in lines), stage
    sizes = score["artifact_bytes"], len(script), score["challenge_bytes"]
    assert "artifact {} bytes, code {} bytes, total {} bytes".format(*sizes) in done.stdout


def test_score_gives_the_bits_of_the_package(tiny_run, tmp_path, fairway):
    """The recipe's held-out text, test-time training included; and any text, as one document."""
    script, artifact = (tiny_run / "score.py").read_bytes(), tiny_run / "artifact.fw"
    done = alone(script, tmp_path / "empty", artifact, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    ours, score = json.loads(done.stdout), json.loads((tiny_run / "score.json").read_text())
    for key in ("code_length_bits", "bits_per_byte", "tokens", "text_sha256", "artifact_sha256"):
        assert ours[key] == score[key], key
    text = tmp_path / "text"
    text.write_bytes(b"The value of an object is what it returns.\xff\x00")
    package = json.loads(fairway("score", text, "-a", artifact, "--device", "cpu", "--json").out)
    words = ("--stage", "sliding", "--device", "cpu")
    done = alone(script, tmp_path / "empty", artifact, text, "--device", "cpu", "--json")
    assert json.loads(done.stdout)["code_length_bits"] == package["code_length_bits"]
    done = alone(script, tmp_path / "empty", artifact, text, *words)
    assert done.stdout.startswith("val_bpb:")
    assert "(sliding, 44 bytes of text)" in done.stdout


def test_scripts_hold_what_their_coder_and_their_fit_need(tmp_path):
    """The training script writes a file; the scoring script opens it and comes to the same score."""
    short = ("train.schedule.steps=2", "score.result=quantized", "score.adapt=none")
    recipe = load(str(TINY), (f"data.path={SAMPLE}", *short, "pack.coder=rans", "quant.fit.budget=27000"))
    done = alone(train_script(recipe), tmp_path / "train", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "train" / "runs").iterdir()
    scored = alone(score_script(recipe), tmp_path / "score", made / "artifact.fw", "--device", "cpu", "--json")
    assert scored.returncode == 0, scored.stderr
    assert f"final val_bpb:{json.loads(scored.stdout)['bits_per_byte']:.8f} (quantized)" in done.stdout


def test_scripts_of_rotated_levels_go_the_whole_way(tmp_path):
    """Text to file by one script, its score by the other; on from its weights by the package, to the same file."""
    short = ("train.schedule.steps=2", "score.result=quantized", "score.adapt=none")
    turbo = ("quant.matrix.form=turbo", "quant.matrix.bits=4", "quant.table.form=rotated", "quant.prune.when=never")
    recipe = load(str(TINY), (f"data.path={SAMPLE}", *short, *turbo))
    train, score = train_script(recipe), score_script(recipe)
    held, decoder = unpacked(train.decode())[1], unpacked(score.decode())[1]
    assert {"fairway.quant.books", "fairway.quant.forms"} <= held.keys()
    assert "fairway.quant.forms" in decoder
    assert "fairway.quant.books" not in decoder
    done = alone(train, tmp_path / "train", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "train" / "runs").iterdir()
    scored = alone(score, tmp_path / "score", made / "artifact.fw", "--device", "cpu", "--json")
    assert scored.returncode == 0, scored.stderr
    assert f"final val_bpb:{json.loads(scored.stdout)['bits_per_byte']:.8f} (quantized)" in done.stdout
    run_tiny(tmp_path / "package", *short, *turbo)
    file = (tmp_path / "package" / "artifact.fw").read_bytes()
    assert file == (made / "artifact.fw").read_bytes()
    (tmp_path / "package" / "artifact.fw").unlink()  # as a run that was killed before it packed
    run_tiny(tmp_path / "package", *short, *turbo)
    assert (tmp_path / "package" / "artifact.fw").read_bytes() == file


@pytest.mark.parametrize("coder", ["rans", "context"])
def test_scripts_of_a_coder_hold_what_it_asks_for(coder):
    recipe = load(str(TINY), (f"pack.coder={coder}",))
    for script in (train_script(recipe), score_script(recipe)):
        assert {f"fairway.artifact.coder.{coder}", "fairway.artifact.entropy.halves"} <= unpacked(script.decode())[
            1
        ].keys()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "the following arguments are required: artifact; usage: script.py"),
        (("a", "b", "c"), "unrecognized arguments: c; usage: script.py"),
        (("ARTIFACT", "--stage"), "argument --stage: expected one argument; usage: script.py"),
        (("ARTIFACT", "--stage", "float"), "--stage float: choices: quantized, sliding, adapted"),
        (("nowhere.fw",), "nowhere.fw: No such file"),
        (("ARTIFACT", "--data", "nowhere"), "nowhere"),
    ],
)
def test_wrong_words_to_score_are_one_line(tiny_run, tmp_path, words, says):
    words = [tiny_run / "artifact.fw" if word == "ARTIFACT" else word for word in words]
    done = alone((tiny_run / "score.py").read_bytes(), tmp_path / "empty", *words)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_the_environment_overrides_the_recipe_and_it_is_said(tiny_run, tmp_path):
    """Other text, another seed, a limit of time: printed and booked; it ends after as many steps as asked for."""
    text = tmp_path / "other.txt"
    text.write_bytes(SAMPLE.read_bytes()[::-1].decode("latin-1").encode() * 2)
    said = {"SEED": "7", "DATA_PATH": str(text), "VOCAB_SIZE": "384", "MAX_WALLCLOCK_SECONDS": "99"}
    script = (tiny_run / "train_gpt.py").read_bytes()
    done = alone(script, tmp_path / "empty", "--device", "cpu", "--steps", "2", **said)
    assert done.returncode == 0, done.stderr
    for line in ("seed = 7", f"data.path = {str(text)!r}", "budget.train_seconds = 99.0"):
        assert f"environment   {line}\n" in done.stdout
    assert "step:2 " in done.stdout
    assert "step:3 " not in done.stdout
    (made,) = (tmp_path / "empty" / "runs").iterdir()
    facts = {row["fact"]: row for row in map(json.loads, (made / "journal.jsonl").read_text().splitlines())}
    assert facts["environment"]["seed"] == facts["run"]["seed"] == 7
    assert made.name.startswith("tiny-7-")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"SEED": "x"}, "SEED = 'x': a whole number, 0 or more, is expected"),
        ({"SEED": "-1"}, "SEED = '-1'"),
        ({"SEED": "1.5"}, "SEED = '1.5'"),
        ({"VOCAB_SIZE": "1025"}, "VOCAB_SIZE = 1025: the recipe's model has 1,024 tokens"),
        ({"MAX_WALLCLOCK_SECONDS": "soon"}, "MAX_WALLCLOCK_SECONDS = 'soon': a number"),
        ({"MAX_WALLCLOCK_SECONDS": "nan"}, "MAX_WALLCLOCK_SECONDS = 'nan': a number"),
        ({"MAX_WALLCLOCK_SECONDS": "0"}, "this recipe trains by the clock"),
        ({"MAX_WALLCLOCK_SECONDS": "10"}, "10 s of it are kept back for calibration"),
    ],
)
def test_wrong_words_of_the_environment_are_one_line(b6, said, says):
    with pytest.raises(RecipeError) as caught:
        overridden(to_plain(b6), said)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_environment_is_laid_over_the_recipe(b6):
    """What was kept back for calibration, 10 of 600 s, is kept back of another limit, too; empty words say nothing."""
    table = to_plain(b6)
    before = copy.deepcopy(table)
    assert overridden(table, {"SEED": "1337", "DATA_PATH": "", "HOME": "x"}) == {}
    assert table == before
    changed = overridden(table, {"MAX_WALLCLOCK_SECONDS": "60", "TOKENIZER_PATH": "t.model", "DATA_PATH": "d"})
    assert changed == {
        "data.path": "d",
        "data.tokenizer.model": "t.model",
        "train.schedule.seconds": 50.0,
        "budget.train_seconds": 60.0,
    }
    one = build(Recipe, table)
    assert (one.train.schedule.seconds, one.data.path, one.data.tokenizer.model) == (50.0, "d", "t.model")
    steps = to_plain(load("pocket"))
    assert overridden(steps, {"MAX_WALLCLOCK_SECONDS": "0"}) == {"budget.train_seconds": 0.0}


def test_steps_below_zero_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--steps", "-5"])
    with pytest.raises(SystemExit) as end:
        training.main("train_gpt.py", {}, {})
    assert end.value.code == 2
    assert capsys.readouterr().err == "RecipeError: --steps -5: 1 or more are expected; 0: all of them\n"


def test_a_wrong_environment_ends_the_script_in_one_line(tiny_run, tmp_path):
    done = alone((tiny_run / "train_gpt.py").read_bytes(), tmp_path / "empty", SEED="x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "RecipeError: SEED = 'x': a whole number, 0 or more, is expected\n"


def test_the_scripts_of_b6_are_small_and_hold_its_techniques_alone(b6):
    """Of the challenge's 16,000,000 bytes the code takes 60,000; the decoder's side is about half of it."""
    train, score = train_script(b6), score_script(b6)
    assert len(train) <= 60_000
    assert len(score) <= 30_000
    (table, modules), (_, decoder) = unpacked(train.decode()), unpacked(score.decode())
    assert "seed" not in table, "all seeds have one script"
    assert build(Recipe, table) == b6
    assert techniques(b6) <= set(modules)
    for absent in (
        "fairway.data.sources.text",
        "fairway.model.mlp.swiglu",
        "fairway.artifact.coder.lzma",
        "fairway.quant.forms",
        "fairway.quant.books",
        "fairway.cli",
    ):
        assert absent not in modules
    for absent in ("fairway.train.loop", "fairway.quant.quantize", "fairway.recipe", "fairway.steps"):
        assert absent in modules
        assert absent not in decoder


@pytest.mark.parametrize("name", ["b6", "pocket", "wiki", "baseline", "b7"])
def test_every_recipe_can_be_exported_without_what_serves_people(name):
    one = load(name)
    for script in (train_script(one), score_script(one)):
        wanted = needs(script.decode())
        assert wanted <= {"torch", "numpy", "sentencepiece", "brotli", "backports", "constriction", "safetensors"}
        compile(script, "script", "exec")


def test_requirements_name_what_is_imported_in_the_versions_at_hand():
    lines = requirements(frozenset({"torch", "numpy", "backports"}))
    assert [line.partition("==")[0] for line in lines] == ["backports.zstd", "numpy", "torch"]
    assert all(line.partition("==")[2][0].isdigit() for line in lines)


def test_a_run_writes_both_scripts_and_books_their_weight(tiny_run):
    facts = {row["fact"]: row for row in map(json.loads, (tiny_run / "journal.jsonl").read_text().splitlines())}
    chosen = load(str(TINY), (f"data.path={SAMPLE}",))
    for role, name, made in (
        ("train", "train_gpt.py", train_script(chosen)),
        ("score", "score.py", score_script(chosen)),
    ):
        assert (tiny_run / name).read_bytes() == made
        assert facts["scripts"][f"{role}_bytes"] == len(made)
    assert facts["code"]["sha256"] == checkout().sha256


def test_weigh_says_what_stat_says(tiny_run, fairway):
    found = json.loads(fairway("weigh", tiny_run, "--json").out)
    sizes = {name: (tiny_run / name).stat().st_size for name in ("artifact.fw", "train_gpt.py", "score.py")}
    assert found["challenge_bytes"] == sizes["artifact.fw"] + sizes["train_gpt.py"]
    assert found["closed_bytes"] == sizes["artifact.fw"] + sizes["score.py"]
    assert found["headroom_bytes"] == 120_000 - found["challenge_bytes"]
    assert sum(found["sections"].values()) == sizes["artifact.fw"]
    assert found["written"] == []
    table = fairway("weigh", tiny_run).out
    for words in (
        "tokenizer",
        f"{found['challenge_bytes']:,}",
        f"{found['closed_bytes']:,}",
        f"{found['headroom_bytes']:,} left",
    ):
        assert words in table


def test_a_script_writes_its_modules_out_to_be_read(tiny_run, tmp_path):
    script = (tiny_run / "score.py").read_bytes()
    done = alone(script, tmp_path / "empty", "--unpack", "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    _, modules = unpacked(script.decode())
    out = tmp_path / "empty" / "out"
    assert (out / "fairway" / "score" / "ledger.py").read_text() == modules["fairway.score.ledger"]
    assert (out / "fairway" / "score" / "__init__.py").exists()
    assert len(list(out.rglob("*.py"))) == len(modules)
    assert "name one folder" in alone(script, tmp_path / "empty", "--unpack").stderr
