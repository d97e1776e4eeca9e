"""Experiments that a script leaves off stay off, whichever way its settings come from a table to where they are used:
argparse over a table of defaults, vars() of what it read, a JSON file that the command names."""
# ruff: noqa: E501 (examples are texts of scripts)

import ast
import json
import re
from pathlib import Path

import pytest

from fairway.audit.beside import table_of, text_at
from fairway.audit.case import Case
from fairway.audit.reading.script import Script
from fairway.audit.settings import UNKNOWN
from fairway.audit.submission import Submission
from tests.audit.order import HEAD, RULES, broken
from tests.audit.small import TABLE, script, verdict

DEFAULTS = '{"data": "./data/shards_val_*.bin", "train_files": "./data/shards_train_*.bin", "cap": 600.0, "reserve": 12.0, "seq_len": 1024, "chunk": 32768, "epochs": 1, "ahead": 0, "bytes_from": "table"}'
MORE = [(f"rate_{i}", 0.1 * i, "a rate") for i in range(70)]
READ = {
    "options and what they mean": f"""
OPTIONS = {[(name, value, "what it is") for name, value in json.loads(DEFAULTS).items()] + MORE}
def settings():
    ap = argparse.ArgumentParser()
    for name, value, meaning in OPTIONS:
        ap.add_argument("--" + name, type=type(value), default=value, help=meaning)
    return vars(ap.parse_args())
""",
    "vars of argparse": """
def settings():
    cfg = dict(DEFAULTS)
    ap = argparse.ArgumentParser()
    ap.add_argument("--config", default="")
    for key, value in cfg.items():
        ap.add_argument("--" + key, type=type(value), default=value)
    out = vars(ap.parse_args())
    out.pop("config", None)
    return out
""",
    "a config before the options": """
def settings(argv=None):
    cfg = dict(DEFAULTS)
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config", default="")
    known, rest = first.parse_known_args(argv)
    if known.config:
        with open(known.config) as f:
            cfg.update(json.load(f))
    ap = argparse.ArgumentParser(parents=[first])
    for key, value in cfg.items():
        ap.add_argument("--" + key, type=type(value), default=value)
    return ap.parse_args(argv).__dict__
""",
    "a config without options": """
def settings():
    ap = argparse.ArgumentParser()
    ap.add_argument("--config", default=None)
    args, _ = ap.parse_known_args()
    given = json.loads(Path(args.config).read_text()) if args.config else {}
    return {**DEFAULTS, **given}
""",
}
AHEAD = """
def main():
    cfg = settings()
    args = types.SimpleNamespace(**cfg)
    model = GPT().cuda()
    train(args, model)
    val = load(cfg["data"])
    for _ in range(cfg["ahead"]):
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        for at in range(0, val.numel() - 1, 1024):
            model(val[at : at + 1024][None], val[at + 1 : at + 1025][None]).backward()
            opt.step()
    final = eval_ttt(args, model, val)
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")

main()
"""
ON = {"ahead": 3}
OFF = {"chunk": 16384}


def accused(read: str, command: str, **files: object) -> set[str]:
    """The rules of order that a script with these settings does not keep; files: JSON beside it, by name."""
    text = "import argparse, json, types\nfrom pathlib import Path\n" + HEAD + f"DEFAULTS = {DEFAULTS}\n" + read + AHEAD
    entry = Script("train_gpt.py", text, ast.parse(text))
    tables = {f"{name}.json": json.dumps(content) for name, content in files.items()}
    readme = f"    torchrun train_gpt.py {command}\n"
    case = Case(Submission(Path("."), "ours", entry, (entry,), {}, {}, {}, readme, tables=tables))
    return {rule.ID for rule in RULES if rule.check(case).verdict != "clean"}


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_what_no_command_turns_on_is_off(read: str) -> None:
    assert accused(read, "", final=ON) == set()


@pytest.mark.parametrize("read", list(READ.values())[:3], ids=list(READ)[:3])
def test_what_an_option_turns_on_is_on(read: str) -> None:
    assert accused(read, "--ahead 3") & {"training-before-scoring", "validation-in-training"}


@pytest.mark.parametrize("read", list(READ.values())[2:], ids=list(READ)[2:])
def test_the_file_that_the_command_names_says_what_is_on(read: str) -> None:
    assert accused(read, "--config final.json", final=ON, other=OFF) & {
        "training-before-scoring",
        "validation-in-training",
    }
    assert accused(read, "--config other.json", final=ON, other=OFF) == set()


BYTES = """
import argparse, json
DEFAULTS = {defaults}
{read}
CFG = settings()
def measured():
    if CFG["bytes_from"] == "table":
        return tables()
    sp = spm.SentencePieceProcessor(model_file="tokenizer.model")
    size = np.array([len(sp.id_to_piece(i).encode("utf-8")) for i in range(V)])
    return size, np.zeros(V, bool), np.ones(V, bool)
"""


@pytest.mark.parametrize("read", READ.values(), ids=READ)
def test_bytes_are_counted_by_the_table_that_the_settings_choose(read: str, tmp_path: Path) -> None:
    text = script(TABLE + BYTES.format(defaults=DEFAULTS, read=read)).replace(
        "size, lead, edge = tables()\n    nats", "size, lead, edge = measured()\n    nats"
    )
    assert "= measured()" in text
    text = text.replace("import argparse, json", "import argparse, json\nfrom pathlib import Path")
    assert verdict(tmp_path, "byte_fallback_three", text).verdict == "clean"
    wrong = re.sub(r"(.bytes_from.[:,] .)table", r"\1pieces", text)
    assert verdict(tmp_path, "byte_fallback_three", wrong).verdict == "violates"
    chosen = {
        "README__md": "    torchrun train_gpt.py --config final.json\n",
        "final__json": '{"bytes_from": "pieces"}',
    }
    if "config else" in read or "cfg.update" in read:
        assert verdict(tmp_path, "byte_fallback_three", text, **chosen).verdict == "violates"


def test_a_file_is_found_from_the_folder_and_from_further_up() -> None:
    texts = {"final.json": "{}", "runs/a.json": '{"a": 1}'}
    assert text_at(texts, "./final.json") == text_at(texts, "records/mine/final.json") == "{}"
    assert text_at(texts, "runs/a.json") == '{"a": 1}'
    assert text_at(texts, "other.json") is None
    assert text_at(texts, None) is None


def test_data_in_json_is_no_table_of_settings() -> None:
    assert table_of('{"betas": [0.9, 0.95]}') == {"betas": [0.9, 0.95]}
    for text in (json.dumps({"tokens": list(range(100))}), "[1, 2]", "{", " " * 70_000 + "{}"):
        assert table_of(text) is UNKNOWN


OPTIONAL = """
def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--again", type=int, help="sweeps before the score")
    ap.add_argument("--set", action="append", default=[])
    given = ap.parse_args()
    args = Hyperparameters()
    model = GPT().cuda()
    train(args, model)
    val = load(args.val_files)
    if given.again is not None:
        eval_ttt(args, model, val)
    final = eval_ttt(args, model, val)
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")

main()
"""


def test_an_option_without_a_default_is_none() -> None:
    text = HEAD.replace("import copy,", "import argparse, copy,") + OPTIONAL
    assert broken(text) == set()
    assert broken(text.replace("given.again is not None", "given.again is None"))


LAID_OVER = """
RECORD = '''{"data": {"train_glob": "./data/shards_train_*.bin", "val_glob": "./data/shards_val_*.bin"},
"score": {"ahead": 0, "orders": [1, 2, 3], "rate": 0.001, "chunk": 32768, "stride": 64, "epochs": 1, "cap": 600.0}}'''

@dataclasses.dataclass
class Data:
    train_glob: str = ""
    val_glob: str = ""

@dataclasses.dataclass
class Score:
    ahead: int = 3
    orders: list = dataclasses.field(default_factory=lambda: [1, 2])
    rate: float = 0.0
    chunk: int = 1024
    stride: int = 64
    epochs: int = 3
    cap: float = 0.0

@dataclasses.dataclass
class Sections:
    data: Data = dataclasses.field(default_factory=Data)
    score: Score = dataclasses.field(default_factory=Score)
    seed: int = 1337

    def overlay(self, tree):
        for section, fields in tree.items():
            target = getattr(self, section)
            if not dataclasses.is_dataclass(target):
                setattr(self, section, type(target)(fields))
                continue
            for name, value in fields.items():
                if not hasattr(target, name):
                    raise KeyError(name)
                setattr(target, name, value)

def main():
    sections = Sections()
    sections.overlay(json.loads(RECORD))
    args = Hyperparameters()
    model = GPT().cuda()
    train(args, model)
    val = load(sections.data.val_glob)
    for _ in range(sections.score.ahead):
        eval_ttt(args, model, val)
    final = eval_ttt(args, model, val)
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")

main()
"""


def test_sections_that_a_text_of_the_script_is_laid_over_have_its_values() -> None:
    text = HEAD.replace("import copy,", "import copy, dataclasses, json,") + LAID_OVER
    assert broken(text) == set()
    assert broken(text.replace('"ahead": 0', '"ahead": 2'))


BY_FIELDS = """
@dataclasses.dataclass(frozen=True)
class Data:
    train_glob: str = "./data/shards_train_*.bin"
    val_glob: str = "./data/shards_val_*.bin"

@dataclasses.dataclass(frozen=True)
class Score:
    ahead: int = 0
    chunk: int = 32768
    rate: float = 0.001
    quick: bool = False

@dataclasses.dataclass(frozen=True)
class Run:
    seed: int = 1337

@dataclasses.dataclass(frozen=True)
class Settings:
    data: Data = dataclasses.field(default_factory=Data)
    score: Score = dataclasses.field(default_factory=Score)
    run: Run = dataclasses.field(default_factory=Run)

    @classmethod
    def parse(cls, argv=None, environ=os.environ):
        ap = argparse.ArgumentParser()
        sections = {each.name: each.default_factory() for each in dataclasses.fields(cls)}
        for title, section in sections.items():
            group = ap.add_argument_group(title)
            for each in dataclasses.fields(section):
                group.add_argument(f"--{each.name}", dest=each.name, default=given(environ, each.name, each.default))
        found = vars(ap.parse_args(argv))
        return cls(**{
            title: type(section)(**{each.name: found[each.name] for each in dataclasses.fields(section)})
            for title, section in sections.items()
        })

def yes(text):
    return text.lower() in ("1", "true", "yes")

def given(environ, name, default):
    text = environ.get(name.upper())
    return default if text is None else (yes if isinstance(default, bool) else type(default))(text)

def main():
    settings = Settings.parse()
    args = Hyperparameters()
    args.train_files = settings.data.train_glob
    args.chunk = settings.score.chunk
    model = GPT().cuda()
    train(args, model)
    val = load(settings.data.val_glob)
    for _ in range(settings.score.ahead):
        eval_ttt(args, model, val)
    final = eval_ttt(args, model, val)
    print(f"final val_loss:{final:.8f} val_bpb:{final / math.log(2) / 2.4:.8f}")

main()
"""


def by_fields(command: str = "", **defaults: str) -> Case:
    """defaults: others for the fields of these names."""
    text = HEAD.replace("import copy,", "import argparse, copy, dataclasses,") + BY_FIELDS
    for name, value in defaults.items():
        text = re.sub(rf"({name}: \w+ = ).*", lambda found, value=value: found[1] + value, text, count=1)
    entry = Script("train_gpt.py", text, ast.parse(text))
    return Case(Submission(Path("."), "ours", entry, (entry,), {}, {}, {}, f"    {command} torchrun train_gpt.py\n"))


@pytest.mark.parametrize(
    ("case", "rules"),
    [
        (by_fields(), set()),
        (by_fields(ahead="2"), {"multi-epoch-last", "rescoring-after-adaptation"}),
        (by_fields("AHEAD=2"), {"multi-epoch-last", "rescoring-after-adaptation"}),
        (by_fields("TRAIN_GLOB='./data/shards_*.bin'"), {"validation-in-training"}),
    ],
    ids=["as they are", "another default", "by the environment", "a pattern that fits both"],
)
def test_settings_that_are_read_field_by_field_are_those_of_their_sections(case: Case, rules: set[str]) -> None:
    found = {rule.ID for rule in RULES if rule.check(case).verdict != "clean"}
    assert bool(found) == bool(rules)
    assert found <= rules
