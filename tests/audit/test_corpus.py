"""The corpus of our own making is sound: every case builds, is Python, and says what an audit must find, and where."""

import importlib.util
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

CORPUS = Path(__file__).parent / "corpus"
PARTS = sorted({cases.parent for cases in CORPUS.glob("*/*.cases")})


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus_make", CORPUS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Built:
    """A part of the corpus, where it was built, and how many cases the maker says there are."""

    part: Path
    folder: Path
    count: int


@pytest.fixture(scope="module", params=PARTS, ids=lambda part: part.name)
def built(maker: ModuleType, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp(request.param.name)
    # Compiles each script, and refuses an edit or a mark that fits nowhere.
    return Built(request.param, folder, maker.make(request.param, folder))


def test_every_case_builds_and_says_where_its_fault_lies(built: Built) -> None:
    cases = tomllib.loads((built.folder / "cases.toml").read_text(encoding="utf-8"))["case"]
    assert len(cases) == built.count
    for case in cases:
        assert (built.folder / case["name"]).is_dir()
        assert bool(case.get("violates")) == bool(case.get("places")), case["name"]
        for place in case.get("places", []):
            assert place["text"], case["name"]


def test_building_twice_gives_the_same_bytes(maker: ModuleType, tmp_path: Path) -> None:
    """Of the smallest part: the largest takes a minute."""
    part = min(PARTS, key=lambda each: sum(path.stat().st_size for path in each.glob("*.cases")))
    one, other = tmp_path / "one", tmp_path / "other"
    assert maker.make(part, one) == maker.make(part, other) > 0
    for path in sorted(one.rglob("*.toml")) + sorted(one.rglob("*.py")):
        assert path.read_bytes() == (other / path.relative_to(one)).read_bytes()


def test_an_edit_that_fits_twice_is_refused(maker: ModuleType) -> None:
    case = maker.read_case("twice\nbase: x\n<<<<\na\n====\nb\n>>>>\n", "here.cases")
    with pytest.raises(maker.CorpusError, match="edit 1 is found 2 times"):
        maker.altered(case, "a\na\n")


SOUND = """import os

@staticmethod
def one(a,
        b,
):
    return (
a, b)

if os.name:
    two = 2
else:
    two = 3
TEXT = \"\"\"
def three(:
\"\"\"
"""


@pytest.mark.parametrize(
    ("line", "put", "wanted"),
    [(7, "    return (a b", False), (8, "a + b)", True), (11, "    two = = 2", False), (13, "    two = 4", True)],
)
def test_a_script_is_read_around_the_lines_that_were_touched(
    maker: ModuleType, line: int, put: str, wanted: bool
) -> None:
    lines = SOUND.split("\n")
    maker.check(SOUND, [], "sound")
    maker.check(SOUND, list(range(1, len(lines) + 1)), "sound")
    lines[line - 1] = put
    if wanted:
        maker.check("\n".join(lines), [line], "touched")
    else:
        with pytest.raises(SyntaxError):
            maker.check("\n".join(lines), [line], "touched")


@pytest.mark.parametrize("kind", ["lzma85", "zlib64", "brotli85", "nested"])
def test_a_wrapped_script_runs_as_the_script_itself(maker: ModuleType, kind: str) -> None:
    space: dict[str, object] = {}
    exec(maker.wrapped(kind, "answer = 6 * 7\n"), space)
    assert space["answer"] == 42
