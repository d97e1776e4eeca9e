"""Settings in a dict whose keys are attributes as well, section by section, with overrides out of the environment."""

import ast
from pathlib import Path

import pytest

from fairway.audit.case import Case
from fairway.audit.reading.dicts import as_objects
from fairway.audit.rules import calibration_on_validation, eval_over_time, subset_as_full, validation_in_training
from fairway.audit.submission import opened
from tests.audit.order import HONEST

FORMS = {
    "by its own methods": """
class Settings(dict):
    def __init__(self, mapping=None, **more):
        super().__init__()
        for key, value in {**(mapping or {}), **more}.items():
            self[key] = Settings(value) if isinstance(value, dict) else value

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name, value):
        self[name] = value
""",
    "by dict's methods": """
class Settings(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    @staticmethod
    def of(tree):
        return Settings({key: Settings.of(value) if isinstance(value, dict) else value for key, value in tree.items()})
""",
    "its own attributes": """
class Settings(dict):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self
        for key, value in list(self.items()):
            if isinstance(value, dict):
                self[key] = Settings(value)
""",
}
LOADED = """
DEFAULTS = {
    "run": {"seed": 1337, "log": {"every": 100, "folder": "logs"}},
    "data": {"train": "./data/shards_train_*.bin", "val": "./data/shards_val_*.bin"},
    "model": {"dim": 64, "layers": 4}, "optim": {"lr": 0.001, "betas": [[0.9, 0.95], [0.8, 0.9]]},
    "average": {"decay": 0.997}, "quant": {"bits": 6}, "cap": 600.0,
    "eval": {"chunk": 32768, "epochs": 3, "most": MOST, "windows": {"stride": 64}},
}

def loaded(defaults, environ):
    tree = copy.deepcopy(defaults)
    for name, text in environ.items():
        path = name.lower().split("__")
        if path[0] not in tree:
            continue
        node = tree
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = type(node[path[-1]])(text)
    return MADE(tree)

cfg = loaded(DEFAULTS, dict(os.environ))
"""
USED = {
    "load(args.val_files)": 'load(cfg["data"].val)[: cfg.eval.most]',
    "Loader(args.train_files)": "Loader(cfg.data.train)",
    "args.chunk": "cfg.eval.chunk",
    "args.epochs": 'cfg.get("eval").epochs',
}


def script(form: str, most: str = "10**9") -> str:
    made = "Settings.of" if "def of" in FORMS[form] else "Settings"
    settings = FORMS[form] + LOADED.replace("MOST", most).replace("MADE", made)
    text = HONEST.replace("def shard(path)", f"{settings}\ndef shard(path)")
    for old, new in USED.items():
        assert old in text
        text = text.replace(old, new)
    return text


def case(folder: Path, text: str) -> Case:
    (folder / "train_gpt.py").write_text(text)
    return Case(opened(folder))


@pytest.mark.parametrize("form", FORMS)
def test_settings_are_followed_by_dots_and_by_keys(form: str, tmp_path: Path) -> None:
    honest = case(tmp_path, script(form))
    assert honest.trial.complete
    assert len(honest.trial.lessons) > 1
    for rule in (validation_in_training, calibration_on_validation, subset_as_full, eval_over_time):
        assert rule.check(honest).verdict == "clean"
    wide = case(tmp_path, script(form).replace("shards_train_", "shards_*_"))
    assert validation_in_training.check(wide).verdict == "violates"
    assert subset_as_full.check(case(tmp_path, script(form, most="1_000_000"))).verdict == "violates"


def test_other_classes_and_lines_stay_what_they_are() -> None:
    text = "class Plain(dict):\n    def total(self):\n        return sum(self.values())\n" + FORMS["by its own methods"]
    tree, other = as_objects(ast.parse(text)), ast.parse(text)
    assert ast.dump(tree.body[0]) == ast.dump(other.body[0])
    kind = tree.body[1]
    assert isinstance(kind, ast.ClassDef)
    assert not kind.bases
    own = [each for each in kind.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
    assert [each.lineno for each in own] == [text[: text.index("def __init__")].count("\n") + 1]
    rows = text.count("\n")
    assert all(0 < node.lineno <= rows for node in ast.walk(tree) if hasattr(node, "lineno"))
    compile(tree, "settings", "exec")
