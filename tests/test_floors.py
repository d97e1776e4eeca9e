"""The floors of the house, read from the imports of every file: who may stand on whom."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
FILES = sorted((SOURCE / "fairway").rglob("*.py"))

ALLOWED = {  # folder -> what of ours it may import; a dotted name allows that module alone
    "base": (),
    "data": ("base",),
    "model": ("base",),
    "train": ("model", "base"),
    "quant": ("model", "base"),
    "artifact": ("quant.grid", "data.tokenizer", "model", "base"),
    "score": ("artifact", "model", "data", "base"),
}
SLOTS = (
    "data/sources",
    "data/loaders",
    "data/transforms",
    "model/attention",
    "model/mlp",
    "model/embed",
    "train/optim",
    "train/objective",
    "quant/calibration",
    "quant/rounding",
    "artifact/coder",
    "score/adapt",
    "score/reshape",
    "score/windows",
    "lab/sweep/engines",
)
PEOPLES_SIDE = {  # package -> files that may import it; it must not travel in an exported script
    "pydantic": ("base/recipes.py",),
    "rich": ("verbs/", "lab/", "audit/"),
    "typer": ("cli/",),
    "matplotlib": ("lab/",),
    "wandb": ("lab/logs/",),
}
TRAVELLING = ("model", "train", "quant", "artifact", "score", "data")
TRAVELLING_MAY = {
    "torch",
    "numpy",
    "sentencepiece",
    "brotli",
    "backports",
    "compression",
    "constriction",
    "safetensors",
}
EXTRAS = {  # package of an extra -> the folder that may import it, which never travels: no recipe reaches it
    "huggingface_hub": "data/fetching/",
    "pyarrow": "data/building/",
    "ray": "lab/sweep/engines/",
    "submitit": "lab/sweep/engines/",
}
KERNELS = {"triton": "model/kernels/"}  # comes with torch's CUDA builds; where it is missing, the twin runs
NETWORK = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "socketserver"}
DTYPE_WORDS = re.compile(r"^(float(8\w*|16|32|64)?|double|half|bfloat16|complex(32|64|128))$")


def place(path: Path) -> str:
    return path.relative_to(SOURCE / "fairway").as_posix()


def folder(path: Path) -> str:
    """The floor a file stands on: its first folder, or its own name where it lies at the top."""
    return place(path).split("/")[0].removesuffix(".py")


def package(path: Path) -> list[str]:
    """The dotted package that a file's relative imports count from."""
    return list(path.relative_to(SOURCE).with_suffix("").parts)[:-1]


@cache  # five rules ask it of every file
def imports(path: Path, text: str | None = None) -> list[str]:
    """Every module a file imports, anywhere in it: `from a import b` counts as a.b, which also catches modules."""
    found = list[str]()
    for node in ast.walk(ast.parse(path.read_text() if text is None else text)):
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package(path)[: len(package(path)) - node.level + 1] if node.level else []
            stem = ".".join([*start, *([node.module] if node.module else [])])
            found.extend(f"{stem}.{alias.name}" for alias in node.names)
    return found


def floor_breaches(path: Path, text: str | None = None) -> list[str]:
    own = folder(path)
    if own not in ALLOWED:
        return []
    allowed = [f"fairway.{name}" for name in (own, *ALLOWED[own])]
    ours = [name for name in imports(path, text) if name.split(".")[0] == "fairway"]
    return [name for name in ours if not any(f"{name}.".startswith(f"{floor}.") for floor in allowed)]


def foreign(path: Path, text: str | None = None) -> list[str]:
    """Packages beyond the standard library and ours."""
    tops = {name.split(".")[0] for name in imports(path, text)}
    return sorted(tops - set(sys.stdlib_module_names) - {"fairway"})


def dtype_literals(text: str) -> list[str]:
    """Words that fix a precision: torch.float32, x.float(), x.to(torch.half), dtype="float32", view_as_complex..."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and DTYPE_WORDS.match(node.attr):
            found.append(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.keyword) and node.arg == "dtype" and isinstance(node.value, (ast.Constant, ast.Name)):
            value = node.value.value if isinstance(node.value, ast.Constant) else node.value.id
            if isinstance(value, str) and DTYPE_WORDS.match(value):
                found.append(f"line {node.value.lineno}: dtype={value}")
    return found


@cache
def techniques() -> set[str]:
    """The dotted names of all files of all slots that hold a Spec; a slot's `__init__` holds what they share."""
    files = (path for path in FILES if place(path).rpartition("/")[0] in SLOTS and path.name != "__init__.py")
    specs = (path for path in files if re.search(r"^class Spec\b", path.read_text(), re.MULTILINE))
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts) for path in specs}


def slot_siblings(path: Path, text: str | None = None) -> list[str]:
    """Imports of one technique by another of the same slot."""
    slot = ".".join(package(path))
    others = [name for name in techniques() if name.rpartition(".")[0] == slot]
    return [name for name in imports(path, text) if any(f"{name}.".startswith(f"{other}.") for other in others)]


@pytest.mark.parametrize("path", FILES, ids=place)
def test_a_file_imports_only_from_the_floors_below(path: Path) -> None:
    assert floor_breaches(path) == []


@pytest.mark.parametrize("path", FILES, ids=place)
def test_what_serves_people_stays_on_the_peoples_side(path: Path) -> None:
    for name, homes in PEOPLES_SIDE.items():
        if name in foreign(path):
            assert any(place(path) == home or (home[-1] == "/" and place(path).startswith(home)) for home in homes), (
                f"{place(path)} imports {name}"
            )


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) in TRAVELLING], ids=place)
def test_what_travels_imports_only_what_is_found_where_it_goes(path: Path) -> None:
    extras = {name for name, home in (EXTRAS | KERNELS).items() if place(path).startswith(home)}
    assert set(foreign(path)) <= TRAVELLING_MAY | extras


def test_an_extra_is_imported_where_it_is_used_alone() -> None:
    for name, home in (EXTRAS | KERNELS).items():
        assert [place(path) for path in FILES if name in foreign(path) and not place(path).startswith(home)] == []


@pytest.mark.parametrize("path", FILES, ids=place)
def test_no_file_reaches_for_the_network_but_where_data_is_fetched(path: Path) -> None:
    """The network of Python's own library is for nobody; the hub's library is held to its folder by EXTRAS."""
    assert {name.split(".")[0] for name in imports(path)} & NETWORK == set()
    if place(path) != "verbs/fetching.py" and not place(path).startswith("data/fetching/"):
        assert not any(f"{name}.".startswith("fairway.data.fetching.") for name in imports(path))


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) in TRAVELLING], ids=place)
def test_what_only_some_recipes_need_is_asked_for_by_a_literal_name(path: Path) -> None:
    """An exported script holds what its recipe reaches; a name that is computed cannot be followed."""
    for node in ast.walk(ast.parse(path.read_text())):
        called = node.func if isinstance(node, ast.Call) else None
        if getattr(called, "attr", getattr(called, "id", "")) == "optional":
            assert isinstance(node, ast.Call)
            assert [type(word) for word in node.args] == [ast.Constant], f"line {node.lineno}"


@pytest.mark.parametrize("path", [path for path in FILES if folder(path) == "model"], ids=place)
def test_the_model_holds_no_dtype_literal_but_in_rotary_and_in_kernels(path: Path) -> None:
    """A kernel names the type that its twin computes in; the twin, held to it in every type, names none."""
    if path.name != "rotary.py" and path.parent.name != "kernels":
        assert dtype_literals(path.read_text()) == []


@pytest.mark.parametrize("path", FILES, ids=place)
def test_techniques_of_one_slot_never_import_one_another(path: Path) -> None:
    if path.name != "__init__.py":
        assert slot_siblings(path) == []


def test_every_slot_is_known_here() -> None:
    """A folder with two or more Specs side by side is a slot; the list above must name it."""
    having: dict[str, int] = {}
    for path in FILES:
        if re.search(r"^class Spec\b", path.read_text(), re.MULTILINE):
            having[place(path).rsplit("/", 1)[0]] = having.get(place(path).rsplit("/", 1)[0], 0) + 1
    assert {name for name, count in having.items() if count > 1} <= set(SLOTS)


# The reader itself, on files made to break each floor.


@pytest.mark.parametrize(
    ("where", "text", "breaches"),
    [
        ("model/x.py", "from fairway.data import tokenizer", 1),
        ("model/x.py", "from ..data.tokenizer import Tokenizer", 1),
        ("model/attention/x.py", "from .. import linear", 0),
        ("model/x.py", "def f():\n    import fairway.score", 1),
        ("artifact/x.py", "from fairway.quant import grid", 0),
        ("artifact/x.py", "from fairway.quant.grid import Quantized", 0),
        ("artifact/x.py", "from fairway.quant.gridlock import X", 1),
        ("artifact/x.py", "from fairway.quant import quantize", 1),
        ("score/x.py", "from fairway.train import loop", 1),
        ("base/x.py", "import fairway.model", 1),
        ("train/x.py", "from fairway import quant", 1),
        ("cli/runs.py", "import fairway.train", 0),
    ],
)
def test_the_reader_sees_a_breach(where: str, text: str, breaches: int) -> None:
    assert len(floor_breaches(SOURCE / "fairway" / where, text)) == breaches


@pytest.mark.parametrize(
    "line",
    ["x.float()", "x.to(torch.float32)", "y = torch.bfloat16", "x.half()", "f(dtype='float64')", "x.double()"],
)
def test_the_reader_sees_a_dtype_literal(line: str) -> None:
    assert dtype_literals(line)
    assert not dtype_literals("x.to(dtype=y.dtype); z: float = float(3); m.floating")


def test_the_reader_sees_one_technique_importing_another() -> None:
    path = SOURCE / "fairway" / "quant" / "rounding" / "x.py"
    assert slot_siblings(path, "from fairway.quant.rounding.nearest import Spec")
    assert slot_siblings(path, "from . import nearest")
    assert slot_siblings(path, "from .nearest import Spec")
    assert not slot_siblings(path, "from fairway.quant.rounding import Solution")
    assert not slot_siblings(path, "from fairway.quant.grid import Quantized")
