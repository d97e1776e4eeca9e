"""What bad input gets, through the command line: one line that names place, value and remedy, the right exit code, and
nothing half-written under its final name."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece

from fairway.base.journal import Run
from fairway.data import Tokenizer, TokenizerSpec
from fairway.data.learning import train
from fairway.data.sources.shards import write_shard
from tests.tiny.way import SAMPLE, TINY

PRODUCTS = {"checkpoint.pt", "weights.safetensors", "hessians.safetensors", "integers.safetensors", "artifact.fw"}
PRODUCTS |= {"score.json", "latest"}
SHORT = ["--set", "train.schedule.steps=3", "--set", "baselines=false", "--set", "proof_bytes=0"]
SHORT += ["--device", "cpu", "--json"]


def refused(answer, family, *says):
    """One line on standard error that begins with the family and says so; the family's exit code."""
    assert answer.err.startswith(f"{family}: "), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert answer.code == (2 if family == "RecipeError" else 1)
    assert answer.out == ""
    for words in says:
        assert words in answer.err, answer.err
    return True


@pytest.fixture
def run(fairway, tmp_path):
    """A short tiny run with other values; whatever fails leaves no product behind."""

    def call(*values, path=SAMPLE):
        overrides = [part for value in (f"data.path={path}", *values) for part in ("--set", value)]
        answer = fairway("run", TINY, *SHORT, *overrides, "--runs", tmp_path / "runs")
        if answer.code:
            left = {file.name for file in (tmp_path / "runs").rglob("*")}
            assert not left & PRODUCTS
            assert not [name for name in left if name.startswith(".") and name != ".lock"], "nor a temporary file"
        return answer

    return call


# Text


def test_a_missing_corpus(run, tmp_path):
    assert refused(run(path=tmp_path / "absent"), "DataError", f"{tmp_path / 'absent'}: no such file; set data.path")
    assert refused(run("data.path="), "RecipeError", "data.path")


def test_an_empty_corpus(run, tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    assert refused(run(path=tmp_path / "empty.txt"), "DataError", "empty.txt: no text in it; set data.path")
    assert refused(run(path=tmp_path / "folder"), "DataError", "folder: no text in it; set data.path")


def test_a_text_too_short_for_one_window(run, tmp_path):
    """2,000 bytes are about 1,100 tokens at most."""
    (tmp_path / "short.txt").write_bytes(SAMPLE.read_bytes()[:2000])
    answer = run("model.context=2048", "train.batch_tokens=2048", path=tmp_path / "short.txt")
    assert refused(answer, "DataError", "tokens are too few for one window of 2,048", "give more text, or a shorter")


def test_a_text_too_short_for_the_tokenizer(run, tmp_path):
    (tmp_path / "short.txt").write_bytes(b"one line of text\n" * 9)
    assert refused(run(path=tmp_path / "short.txt"), "DataError", "384 pieces", "set data.tokenizer.vocab lower")


def test_a_packed_text_that_is_cut_short(run, tmp_path):
    import lzma

    (tmp_path / "text.xz").write_bytes(lzma.compress(SAMPLE.read_bytes())[:-500])
    assert refused(run(path=tmp_path / "text.xz"), "DataError", "text.xz: damaged or cut short", "again")


# Token shards


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "sample.model"
    path.write_bytes(train([SAMPLE.read_bytes()], TokenizerSpec(vocab=384)))
    return path


@pytest.fixture
def shards(tmp_path, tokenizer_file):
    """A folder of two good shards."""
    tokens = Tokenizer(tokenizer_file.read_bytes()).encode(SAMPLE.read_bytes())
    folder = tmp_path / "shards"
    folder.mkdir()
    for part, piece in (("train", tokens[:4000]), ("val", tokens[4000:])):
        write_shard(folder / f"fineweb_{part}_000000.bin", np.concatenate(([1], piece)).astype(np.uint16))
    return folder


@pytest.fixture
def run_shards(run, shards, tokenizer_file):
    return lambda *values: run("data.source=shards", f"data.tokenizer.model={tokenizer_file}", *values, path=shards)


def test_good_shards_are_scored_and_the_score_says_that_the_text_was_decoded(run_shards):
    answer = run_shards()
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["decoded_text"] is True


def changed(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(bytes(content))


def test_a_shard_with_a_wrong_magic(run_shards, shards):
    changed(shards / "fineweb_train_000000.bin", 0, (20240521).to_bytes(4, "little"))
    assert refused(run_shards(), "DataError", "fineweb_train_000000.bin: begins with 20240521, not with 20240520")


@pytest.mark.parametrize("size", [-2, -1, 2, -4000])
def test_a_shard_of_a_wrong_size(run_shards, shards, size):
    path = shards / "fineweb_val_000000.bin"
    content = path.read_bytes()
    path.write_bytes(content[:size] if size < 0 else content + bytes(size))
    assert refused(run_shards(), "DataError", "fineweb_val_000000.bin: ", f"{len(content) + size:,} bytes", "again")


def test_a_held_out_shard_under_a_training_name(run_shards, shards):
    shutil.copy(shards / "fineweb_val_000000.bin", shards / "fineweb_train_000001.bin")
    assert refused(run_shards(), "HonestyError", "fineweb_train_000001.bin: the same tokens as the held-out")


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_shard_with_a_token_that_the_tokenizer_does_not_have(run_shards, shards, part):
    changed(shards / f"fineweb_{part}_000000.bin", 1024 + 2 * 100, (384).to_bytes(2, "little"))
    assert refused(run_shards(), "DataError", f"fineweb_{part}_000000.bin", "384", "100")


def test_a_folder_without_shards_and_shards_without_a_tokenizer(run, run_shards, shards):
    assert refused(run("data.source=shards", path=shards), "RecipeError", "data.tokenizer.model: not set")
    (shards / "fineweb_train_000000.bin").unlink()
    assert refused(run_shards(), "DataError", "no file named fineweb_train_*.bin; set data.path")


# Tokenizers


@pytest.fixture(scope="module")
def lossy_file(tmp_path_factory):
    """A tokenizer that normalises: NFKC, and spaces made one."""
    path = tmp_path_factory.mktemp("lossy") / "lossy"
    sentencepiece.SentencePieceTrainer.train(
        input=str(SAMPLE),
        model_prefix=str(path),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="nfkc",
    )
    return path.with_suffix(".model")


def test_a_tokenizer_that_is_lossy_on_the_text(run, lossy_file):
    answer = run(f"data.tokenizer.model={lossy_file}")
    assert refused(answer, "DataError", "data.lossy", "score_decoded")
    taken = run(f"data.tokenizer.model={lossy_file}", "data.lossy=score_decoded", "budget.artifact_bytes=0")
    assert taken.code == 0, taken.err
    assert json.loads(taken.out)["decoded_text"] is True


def test_a_tokenizer_that_is_absent_or_none_or_of_another_size(run, lossy_file, tmp_path):
    assert refused(run("data.tokenizer.model=absent.model"), "DataError", "data.tokenizer.model: absent.model: No such")
    assert refused(run(f"data.tokenizer.model={SAMPLE}"), "DataError", "sample.txt: no SentencePiece model")
    answer = run(f"data.tokenizer.model={lossy_file}", "data.tokenizer.vocab=500")
    assert refused(answer, "RecipeError", "data.tokenizer.vocab = 500: ", "has 384 pieces; set data.tokenizer.vocab")


# Recipes


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("data.paht=x", "data.paht: unknown key (did you mean 'path'?)"),
        ("trian.clip=1", "trian: unknown key (did you mean 'train'?)"),
        ("train.optim.matrix.lrr=0.1", "train.optim.matrix.lrr: unknown key (did you mean 'lr'?)"),
        ("train.clip=abc", "train.clip = 'abc': "),
        ("seed=1.5", "seed = 1.5: "),
        ("model.layers=true", "model.layers = True: "),
        ("data.lossy=maybe", "data.lossy = 'maybe'; choices: refuse, score_decoded"),
        ("model.embed=smear", "model.embed = 'smear': a list of techniques is expected"),
        ("model.mlp=relu3", "model.mlp = 'relu3': no such technique (did you mean 'relu2'?); choices: fused_relu2, "),
        ("model.width=33", "model: heads = 2 does not divide width = 33; choose a divisor"),
        ("model.heads=3", "model: heads = 3 does not divide width = 32; choose a divisor"),
        ("model.rotary.dims=7", "model.rotary: dims = 7: an even number is needed"),
        ("model.rotary.dims=18", "model: rotary.dims = 18 is more than a head's 16 dimensions"),
        ("model.context=0", "model: context = 0: at least 1 is needed"),
        ("model.value_embedding.layers=[3]", "model: value_embedding.layers = 3: layers go from 0 to 2"),
        ("train.batch_tokens=500", "500 tokens: a multiple of the context (64) is needed"),
        ("quant.matrix.bits=9", "quant.matrix: bits = 9: 2 to 8"),
        ("quant.calibration_sequences=0", "quant: calibration_sequences = 0: at least 1 is needed"),
        ("quant.calibration_batch=0", "quant: calibration_batch = 0: at least 1 is needed"),
        ('quant.override=[{parts=["w"], bits=4}]', "quant.override[0].parts = 'w': not in this model; parts: "),
        ("data.tokenizer.vocab=200", "data.tokenizer: vocab = 200: 256 to 65,536"),
        ("score.windows.stride=65", "stride = 65 is larger than the context of 64 tokens"),
        ("score.result=float", 'score: result = "float": the artifact holds integers'),
        ("score.adapt=none", 'score: result = "adapted", but adapt = "none"'),
        ("nonsense", "--set 'nonsense': write key=value"),
        ("=3", "--set '=3': write key=value"),
    ],
)
def test_a_recipe_that_asks_wrongly_is_refused_before_training(run, tmp_path, value, says):
    assert refused(run(value), "RecipeError", says)
    for journal in (tmp_path / "runs").glob("*/journal.jsonl"):
        assert '"fact": "train"' not in journal.read_text()


def test_a_clock_without_time_for_calibration(run):
    clock = ["train.schedule.by=clock", "train.schedule.seconds=60.0", "budget.train_seconds=60.0"]
    assert refused(run(*clock), "RecipeError", "train.schedule.seconds = 60", "budget.train_seconds = 60")


def test_more_training_text_that_is_the_held_out_file(run):
    assert refused(run(f'data.source.more=["{SAMPLE}"]'), "RecipeError", "data.source.more", "held out")


def test_a_run_folder_whose_recipe_was_edited_by_hand(fairway, tiny_run, tmp_path):
    """Its products were made with other values: none may be scored under these."""
    folder = tmp_path / "edited"
    shutil.copytree(tiny_run, folder)
    path = folder / "recipe.toml"
    path.write_text(path.read_text().replace("temperature = 1.0", "temperature = 0.98"))
    for verb in (["run", "--resume"], ["score"], ["pack"]):
        assert refused(fairway(*verb, folder, "--json"), "RecipeError", "recipe.toml")


def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(run):
    assert refused(run("model.layers=1000000000"), "RecipeError", "GB to train", "lower model.layers")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[model\nwidth = 1", "wrong.toml: "),
        ("model = 5", "model = 5: a table is expected"),
        ("extends = 'absent.toml'", "absent.toml: no such file"),
        ("extends = 'wrong.toml'", "wrong.toml: extends itself"),
        ("\x00", "wrong.toml: "),
    ],
)
def test_a_recipe_file_that_is_no_recipe(fairway, tmp_path, text, says):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    assert refused(fairway("run", path, "--runs", tmp_path / "runs"), "RecipeError", says)
    assert not (tmp_path / "runs").exists()


# Disk and folder


def limited(tmp_path, kilobytes, *command):
    """A process that may write no file beyond the limit: EFBIG, as a full disk gives ENOSPC."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000,) * 2)

    done = subprocess.run(
        [sys.executable, "-m", "fairway", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=limit,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert ": could not be written: File too large; free some space" in last
    return last


full_disk = pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")


@full_disk
@pytest.mark.parametrize(("kilobytes", "file"), [(2, "recipe.toml"), (60, "checkpoint.pt")])
def test_a_full_disk_in_training(tmp_path, kilobytes, file):
    line = limited(tmp_path, kilobytes, "run", TINY, *SHORT, "--set", f"data.path={SAMPLE}", "--runs", "runs")
    assert f"/{file}: could" in line
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"recipe.toml", "journal.jsonl", "curves.jsonl", ".lock"} - {file}


@full_disk
@pytest.mark.parametrize(
    ("kilobytes", "gone", "verb"),
    [(30, "integers.safetensors", "quantize"), (15, "artifact.fw", "pack")],
)
def test_a_full_disk_later_and_again_with_room(fairway, tiny_run, tmp_path, kilobytes, gone, verb):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / gone).unlink()
    before = {path.name for path in folder.iterdir()}
    assert f"{gone}: could" in limited(tmp_path, kilobytes, verb, folder)
    assert {path.name for path in folder.iterdir()} == before
    assert fairway(verb, folder).code == 0
    assert (folder / gone).read_bytes() == (tiny_run / gone).read_bytes()


def test_a_place_that_cannot_be_written(fairway, tmp_path):
    (tmp_path / "file").write_text("")
    answer = fairway("run", TINY, *SHORT, "--set", f"data.path={SAMPLE}", "--runs", tmp_path / "file")
    assert refused(answer, "RecipeError", f"{tmp_path / 'file'}: ", "name a folder that can be written")


@pytest.mark.parametrize("verb", [["run", "--resume"], ["quantize"], ["pack"], ["score"], ["probe"]])
def test_a_locked_run_folder(fairway, tiny_run, tmp_path, verb):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    with Run(folder):
        answer = fairway(*verb, folder)
    assert refused(answer, "RecipeError", f"run folder {folder}: in use by another process; wait for it")


# Artifacts


def test_an_artifact_over_budget(fairway, tmp_path):
    """It takes 26 KB; the integers stay, so that `pack` can be called again."""
    call = ["--set", f"data.path={SAMPLE}", "--set", "budget.artifact_bytes=9999", "--runs", tmp_path / "runs"]
    answer = fairway("run", TINY, *SHORT, *call)
    assert refused(
        answer, "BudgetError", "artifact + code: ", "bytes is over the limit of 9,999; 2", "; quantise to fewer bits"
    )
    left = {path.name for path in (tmp_path / "runs").rglob("*")}
    assert not left & {"artifact.fw", "score.json", "latest", "checkpoint.pt"}
    assert "integers.safetensors" in left


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text").write_bytes(b"The wind is in the north, and the bar is at nine metres.\n" * 4)
    return tmp_path / "text"


@pytest.mark.parametrize("keep", [0, 3, 10, 40, 400, 5_000, 20_000, -33, -32, -1])
def test_an_artifact_that_is_cut_short(fairway, tiny_run, tmp_path, text, keep):
    (tmp_path / "cut.fw").write_bytes((tiny_run / "artifact.fw").read_bytes()[:keep])
    for verb in (["score", "-a", tmp_path / "cut.fw", text], ["sample", "-a", tmp_path / "cut.fw"]):
        assert refused(fairway(*verb), "ArtifactError", "cut.fw: section ", ";")


def test_an_artifact_altered_in_any_place(fairway, tiny_run, tmp_path, text):
    """One bit, in the magic, the version, the lengths, the header, every section and the checksum."""
    content = (tiny_run / "artifact.fw").read_bytes()
    for place in [*range(16), *np.linspace(16, len(content) - 1, 24).astype(int).tolist()]:
        altered = bytearray(content)
        altered[place] ^= 1 << (place % 8)
        (tmp_path / "altered.fw").write_bytes(bytes(altered))
        answer = fairway("score", "-a", tmp_path / "altered.fw", text)
        assert refused(answer, "ArtifactError", "altered.fw: section "), place


def test_another_file_in_an_artifact_s_place(fairway, tmp_path, text):
    assert refused(fairway("score", "-a", text, text), "ArtifactError", "this is no fairway artifact; name a file")
    assert refused(fairway("score", "-a", tmp_path, text), "ArtifactError", "Is a directory; name an artifact")
    assert refused(fairway("score", "-a", tmp_path / "absent", text), "ArtifactError", "absent: No such file")


def test_no_pickle_is_ever_loaded(fairway, tmp_path, text):
    """A pickle that would write a file, under both suffixes that are read."""
    import pickle

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    for name in ("trap.fw", "trap.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        assert refused(fairway("score", "-a", tmp_path / name, text), "ArtifactError", name)
    assert not (tmp_path / "sprung").exists()


def test_a_score_of_nothing(fairway, tiny_run, tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    call = ["score", "-a", tiny_run / "artifact.fw"]
    assert refused(fairway(*call, tmp_path / "empty"), "DataError", "empty: 0 bytes, nothing to score; name a file")
    assert refused(fairway(*call, tmp_path / "absent"), "DataError", "absent: No such file or directory; name a file")
    assert refused(fairway(*call, tmp_path), "DataError", "Is a directory; name a file")


@pytest.mark.parametrize("product", ["weights", "hessians", "integers"])
@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b"no", lambda b: b""], ids=["cut", "other", "empty"])
def test_a_damaged_product_of_a_run_is_one_line(fairway, tiny_run, tmp_path, product, damage):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    path = folder / f"{product}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    later = {"weights": "integers.safetensors", "hessians": "integers.safetensors", "integers": "artifact.fw"}[product]
    (folder / later).unlink()
    answer = fairway("pack" if product == "integers" else "quantize", folder)
    assert answer.code == 1
    assert answer.err.count("\n") == 1, answer.err
    assert path.name in answer.err
    assert not (folder / later).exists()


def test_a_damaged_checkpoint_is_one_line(fairway, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    for product in PRODUCTS - {"checkpoint.pt", "latest"}:
        (folder / product).unlink()
    (folder / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    answer = fairway("run", "--resume", folder, "--json")
    assert refused(answer, "DataError", "checkpoint.pt: not a checkpoint of this version", "start the run anew")
