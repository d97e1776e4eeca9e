"""Code as one script: what is reached stays and does the same, the rest goes; the same code gives the same bytes."""

import subprocess
import sys
import textwrap

import pytest

from fairway.artifact.bundle import closure, imported, packed, unpacked
from fairway.base.errors import ArtifactError, ContractError, RecipeError


@pytest.fixture
def house(tmp_path):
    """Writes a small package: house({"a": source, "b.c": source}) -> the folder it lies in."""

    def build(sources):
        for name, source in {"__init__": "", **sources}.items():
            path = tmp_path.joinpath("house", *name.split(".")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            for parent in [path.parent, *path.parent.parents]:
                if parent == tmp_path:
                    break
                (parent / "__init__.py").touch()
            path.write_text(textwrap.dedent(source))
        return tmp_path

    return build


def run(script, tmp_path, *words):
    """Output of a script, alone in an empty folder."""
    place = tmp_path / "empty"
    place.mkdir(exist_ok=True)
    (place / "script.py").write_text(script)
    command = [sys.executable, "-I", "script.py", *words]
    return subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)


def script_of(root, entry="house.main:main", techniques=(), **table):
    return packed(closure(root, entry, techniques).modules, table, entry, "script.py", "a script")


def test_a_script_runs_alone_and_hands_over_its_place_and_its_table(house, tmp_path):
    main = "from house.deep.b import double\ndef main(place, table, sources):\n    print(place, double(table['x']))"
    root = house({"main": main, "deep.b": "def double(x):\n    return 2 * x"})
    done = run(script_of(root, x=21), tmp_path)
    assert done.stdout.split()[1:] == ["42"], done.stderr
    assert done.stdout.split()[0].endswith("script.py")


def test_what_nothing_reaches_is_left_out(house):
    """A definition, an import that only it needs, a re-export, and a whole module."""
    root = house(
        {
            "main": "from house.shop import used\ndef main(place, table, sources):\n    return used()",
            "shop.__init__": "from house.shop.a import used\nfrom house.shop.b import unused\n__all__ = ['unused']",
            "shop.a": "import json\nimport heavy\ndef used():\n    return json\ndef other():\n    return heavy",
            "shop.b": "import heavier\ndef unused():\n    return heavier",
        }
    )
    found = closure(root, "house.main:main")
    assert set(found.modules) == {"house", "house.main", "house.shop", "house.shop.a"}
    assert "other" not in found.modules["house.shop.a"]
    assert found.foreign == {"json"}


@pytest.mark.parametrize(
    "body",
    [
        "from house.b import f\n    return f",  # inside the function
        "import house.b\n    return house.b.f",
        "from house import b\n    return b.f",
        "from . import b as other\n    return other.f",
        "if place:\n        from house.b import f\n    return f",
    ],
)
def test_an_import_inside_a_function_is_followed(house, body):
    root = house(
        {"main": f"def main(place, table, sources):\n    {body}", "b": "def f():\n    pass\ndef g():\n    pass"}
    )
    modules = closure(root, "house.main:main").modules
    assert "def f" in modules["house.b"]
    assert "def g" not in modules["house.b"]


def test_a_local_name_is_no_name_of_the_module(house):
    """The argument `other`, the loop's and the comprehension's variable are the function's own."""
    root = house(
        {
            "main": """
            def main(place, table, other):
                for loop in other:
                    pass
                return [inner for inner in other], (lambda word: word)(1)
            def other(): pass
            def loop(): pass
            def inner(): pass
            def word(): pass
            """
        }
    )
    assert closure(root, "house.main:main").modules["house.main"].count("def ") == 1


def test_techniques_keep_what_is_asked_for_by_name(house):
    """Looked up while it runs: the Spec, and what something reached names as an attribute; named outright, too."""
    technique = "class Spec:\n    pass\ndef build(spec):\n    return 'built'\ndef unasked():\n    pass"
    root = house(
        {
            "main": "def main(place, table, sources):\n    return technique('house.slot', 'sure'), look().build(1)",
            "slot.named": technique,
            "slot.sure": technique,
            "slot.idle": technique,
        }
    )
    modules = closure(root, "house.main:main", ["house.slot.named"]).modules
    for name in ("named", "sure"):
        assert "class Spec" in modules[f"house.slot.{name}"]
        assert "def build" in modules[f"house.slot.{name}"]
        assert "unasked" not in modules[f"house.slot.{name}"]
    assert "house.slot.idle" not in modules


def test_an_optional_module_comes_where_it_is_wanted(house):
    root = house(
        {"main": "def main(place, table, sources):\n    return optional('house.extra').go()", "extra": "def go(): pass"}
    )
    assert "house.extra" in closure(root, "house.main:main", wants=lambda name: name == "house.extra").modules
    assert "house.extra" not in closure(root, "house.main:main", wants=lambda name: False).modules


def test_methods_that_nothing_names_go_and_those_a_framework_calls_stay(house):
    root = house(
        {
            "main": """
            from torch import nn
            class Plain:
                def __init__(self): self.steps = 0
                def used(self): return self.steps
                def steps(self): return self._inner()
                def _inner(self): pass
            class Net(nn.Module):
                def forward(self, x): return x
                def idle(self): pass
            class Foreign(list):
                def idle(self): pass
            def main(place, table, sources): return Plain().used(), Net()(1), Foreign()
            """
        }
    )
    source = closure(root, "house.main:main").modules["house.main"]
    assert "def used" in source
    assert "def forward" in source
    assert source.count("def idle") == 1, "of a base that we do not know, everything stays"
    assert "_inner" not in source


def test_stripping_keeps_what_the_program_reads(house, tmp_path):
    """Fields of dataclasses and named tuples, defaults, values of annotated assignments; nothing else of it."""
    root = house(
        {
            "main": '''
            """A module's docstring."""
            from dataclasses import dataclass, fields
            from typing import NamedTuple, TYPE_CHECKING
            if TYPE_CHECKING:
                from nowhere import Nothing
            @dataclass
            class Spec:
                """Only this."""
                a: int = 3  # and a comment
                b: "Nothing | None" = None
            class Pair(NamedTuple):
                x: int
                y: "str" = "z"
            class Empty:
                """Only this, too."""
            def quiet(x: "Nothing") -> "Nothing":
                """Only this as well."""
            def main(place: str, table: dict, sources: dict) -> None:
                count: int = 2
                later: int
                later = count + Spec().a
                text = "# no comment"
                print([f.name for f in fields(Spec)], Pair(1), later, text, quiet(1), Empty.__doc__)
            '''
        }
    )
    done = run(script_of(root), tmp_path)
    assert done.stdout == "['a', 'b'] Pair(x=1, y='z') 5 # no comment None None\n", done.stderr
    source = closure(root, "house.main:main").modules["house.main"]
    for word in ("Only this", "docstring", "and a comment", "nowhere", "-> "):
        assert word not in source


def test_annotations_stay_under_a_decorator_that_may_read_them(house, tmp_path):
    """As Triton's jit reads `tl.constexpr`."""
    root = house(
        {
            "main": """
            def jit(function):
                return {name: kind.__name__ for name, kind in function.__annotations__.items()}
            @jit
            def kernel(pointer, BLOCK: int): pass
            def main(place, table, sources): print(kernel)
            """
        }
    )
    assert run(script_of(root), tmp_path).stdout == "{'BLOCK': 'int'}\n"


def test_short_names_change_nothing_that_can_be_seen(house, tmp_path):
    """Keywords, closures, comprehensions, exceptions, defaults, names that are the module's or built in as well."""
    root = house(
        {
            "main": """
            shared = 7
            def keyed(first, second=2, *others, third=3, **rest):
                return first, second, others, third, rest
            def nested(value):
                total = value
                def add(amount):
                    return total + amount + shared
                return [add(item) for item in range(total) if (doubled := item * 2) < 9], doubled
            def caught(text):
                try:
                    return int(text)
                except ValueError as problem:
                    return type(problem).__name__
            def hidden(shared, list):
                return shared, list
            def looks(value):
                inside = value
                return sorted(locals())
            def main(place, table, sources):
                print(keyed(1, second=5, third=4, extra=6), keyed(1, 2, 8), nested(3), caught("x"), caught("4"))
                print(hidden(1, 2), looks(1), f"{shared=}", (lambda number: number + shared)(1))
            """
        }
    )
    script = script_of(root)
    done = run(script, tmp_path)
    assert done.stdout.splitlines() == [
        "(1, 5, (), 4, {'extra': 6}) (1, 2, (8,), 3, {}) ([10, 11, 12], 4) ValueError 4",
        "(1, 2) ['inside', 'value'] shared=7 8",
    ], done.stderr
    assert "amount" not in unpacked(script)[1]["house.main"]


def test_a_traceback_names_module_and_line_and_the_source_can_be_asked_for(house, tmp_path):
    """`inspect.getsource` is what Triton and torch.compile find their kernels' text with."""
    root = house(
        {
            "main": "import inspect\nfrom house.deep.b import broken\ndef main(place, table, sources):\n"
            "    print(inspect.getsource(broken), end='')\n    broken(0)",
            "deep.b": "def broken(x):\n    # a comment\n    return 1 / x",
        }
    )
    done = run(script_of(root), tmp_path)
    assert done.returncode == 1
    assert done.stdout == "def broken(a):\n return 1 / a\n"
    place = str(tmp_path / "empty" / "script.py")
    assert 'script.py/house.deep.b.py", line 2, in broken' in done.stderr
    assert "return 1 / a" in done.stderr, place


def test_a_bundled_function_can_be_compiled(house, tmp_path):
    """torch.compile reads bytecode and source of what it traces."""
    root = house(
        {
            "main": "import torch\nfrom house.b import f\ndef main(place, table, sources):\n"
            "    print(torch.compile(f, backend='eager', fullgraph=True)(torch.ones(2)).tolist())",
            "b": "def f(x):\n    return x + 1",
        }
    )
    done = run(script_of(root), tmp_path)
    assert done.stdout == "[2.0, 2.0]\n", done.stderr


def test_the_same_code_gives_the_same_bytes(house):
    root = house(
        {
            "main": "from house.b import f\ndef main(place, table, sources):\n    return f()",
            "b": "def f():\n    return {1, 2}",
        }
    )
    code = (
        "import pathlib, sys, tests.artifact.test_bundle as here\nprint(here.script_of(pathlib.Path(sys.argv[1]), k=1))"
    )
    seen = set()
    for seed in ("0", "1"):  # of the hashes that order sets
        command = [sys.executable, "-c", code, str(root)]
        environment = {"PYTHONHASHSEED": seed, "PATH": "", "PYTHONPATH": "."}
        seen.add(subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout)
    assert seen == {script_of(root, k=1) + "\n"}


def test_a_script_can_be_read(house):
    root = house({"main": "from house.deep.b import f\ndef main(p, t, s):\n    f()", "deep.b": "def f():\n    pass"})
    table, modules = unpacked(script_of(root, key=[1, 2.5, None, "ä"]))
    assert table == {"key": [1, 2.5, None, "ä"]}
    assert set(modules) == {"house", "house.main", "house.deep", "house.deep.b"}
    assert modules["house.deep.b"] == "def f():\n pass\n"
    assert imported(modules.values()) == {"house"}


def test_annotations_stay_for_classes_that_are_made_of_tables(house, tmp_path):
    """`build` reads them, of classes inside classes and through aliases; those of others say no more than `int`."""
    root = house(
        {
            "main": """
            import dataclasses, typing
            from house.spec import Outer
            from house.other import Idle
            def build(cls, table):
                return {name: build(hint, 0) if dataclasses.is_dataclass(hint) else hint for name, hint
                        in typing.get_type_hints(cls).items()}
            def main(place, table, sources):
                print(build(Outer, table), Idle(1, 2).y)
            """,
            "spec": """
            from dataclasses import dataclass
            from typing import Literal
            Word = Literal["a", "b"]
            @dataclass
            class Inner:
                word: Word
            @dataclass
            class Outer:
                inner: Inner
                number: float
            """,
            "other": """
            from typing import NamedTuple
            from house.heavy import Heavy
            class Idle(NamedTuple):
                x: Heavy
                y: "Heavy | None"
            """,
            "heavy": "class Heavy: pass",
        }
    )
    script = script_of(root)
    found = run(script, tmp_path)
    assert found.stdout == "{'inner': {'word': typing.Literal['a', 'b']}, 'number': <class 'float'>} 2\n", found.stderr
    assert "house.heavy" not in unpacked(script)[1]


def test_a_call_that_a_function_cannot_take_is_not_asking_for_it(house):
    """`"text".encode()` is no coder's encode(group, spec), nor is a call with a word that it does not know."""
    coder = "class Spec: pass\ndef encode(group, spec): pass\ndef decode(blob, layout): pass\ndef call(a, *, c=2): pass"
    root = house(
        {
            "main": """
            def main(place, table, sources):
                "x".encode(), "x".encode("utf-8", errors="strict")
                technique("house.slot", "coder").decode(place, layout=table)
                return technique("house.slot", "coder").call(*sources)
            """,
            "slot.coder": coder,
        }
    )
    source = closure(root, "house.main:main").modules["house.slot.coder"]
    assert "encode" not in source
    assert "def decode" in source
    assert "def call" in source


def test_strings_of_several_lines_keep_their_blanks(house, tmp_path):
    root = house({"main": 'def main(place, table, sources):\n    x = 1\n    print(f"""a\n        b{x}""")'})
    assert run(script_of(root), tmp_path).stdout == "a\n        b1\n"


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("from house.b import *\ndef main(p, t): pass", ContractError, "say which names"),
        ("def main(p, t): return __file__", ContractError, "hand the place over"),
        (
            "from house.b import absent\ndef main(p, t): return absent",
            ContractError,
            "nothing in it is called 'absent'",
        ),
        ("from house.absent import f\ndef main(p, t): return f", ContractError, "house.absent: no such module"),
        ("def main(p, t): return technique('house.slot', 'absent')", RecipeError, "house.slot.absent"),
    ],
)
def test_what_cannot_be_told_beforehand_is_refused(house, source, error, says):
    root = house({"main": source, "b": "", "slot.a": ""})
    with pytest.raises(error, match=says) as caught:
        closure(root, "house.main:main")
    assert "\n" not in str(caught.value)


def test_no_packed_modules_is_an_error_in_one_line():
    with pytest.raises(ArtifactError, match="no packed modules in it"):
        unpacked("print(1)")


def test_a_word_of_a_literal_is_no_name(house, tmp_path):
    """A choice may be called like a function of its module, which does not travel for that; a quoted type does."""
    main = """
        from dataclasses import dataclass, fields
        from typing import Literal

        class Kept: ...

        def heavy(): ...

        @dataclass
        class Spec:
            way: Literal["heavy", "light"] = "light"
            kept: "Kept | None" = None

        def build(cls, table):
            return cls(**table)

        def main(place, table, sources):
            print(build(Spec, table).way, [field.name for field in fields(Spec)])
    """
    found = closure(house({"main": main}), "house.main:main").modules["house.main"]
    assert "class Kept" in found
    assert "def heavy" not in found
