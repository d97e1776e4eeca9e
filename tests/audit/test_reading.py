"""Scripts are read as text: unpacked by evaluating constants alone, within bounds, and never executed."""

import ast
import base64
import bz2
import gzip
import json
import lzma
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest

from fairway.audit.reading import Folder, Reader, Script, bounds
from fairway.audit.submission import opened

INNER = "import torch\n\n\ndef main():\n    print('val_bpb', 1.0)\n\n\nif __name__ == '__main__':\n    main()\n"
RAW = [{"id": lzma.FILTER_LZMA2}]


def read(folder: Path, text: str | bytes, name: str = "train_gpt.py") -> Script:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(content)
    return Reader(Folder(folder)).script(name)


def b85(content: bytes) -> str:
    return repr(base64.b85encode(content).decode())


def b64(content: bytes) -> str:
    return repr(base64.b64encode(content).decode())


def packed(content: bytes) -> dict[str, str]:
    """How people pack a script: the shape of the wrapper by a name."""
    raw = lzma.compress(content, format=lzma.FORMAT_RAW, filters=RAW)
    small = zlib.compress(content)
    halves, wide, zipped = b64(small)[1:-1], base64.a85encode(brotli.compress(content)), b64(gzip.compress(content))
    return {
        "raw lzma, base85, one line": "import lzma as L,base64 as B\nexec(L.decompress(B.b85decode("
        f'{b85(raw)}),format=L.FORMAT_RAW,filters=[{{"id":L.FILTER_LZMA2}}]))',
        "xz, base64, compiled": f"import lzma, base64\nDATA = {b64(lzma.compress(content))}\n"
        'code = compile(lzma.decompress(base64.b64decode(DATA)).decode(), "t.py", "exec")\nexec(code, globals())',
        "brotli": f"import base64, brotli\nexec(brotli.decompress(base64.a85decode({wide!r})))",
        "gzip through a file object": "import gzip, io, base64\n"
        f"with gzip.GzipFile(fileobj=io.BytesIO(base64.b64decode({zipped}))) as f:\n    exec(f.read())",
        "bz2 by a star import": "from bz2 import *\nfrom base64 import *\n"
        f"exec(decompress(b64decode({b64(bz2.compress(content))})))",
        "hex and codecs": f"import codecs\nexec(codecs.decode(codecs.decode({small.hex()!r}, 'hex'), 'zlib').decode())",
        "helpers and parts": f"import zlib, base64\nA = {halves[::2]!r}\nB = {halves[1::2]!r}\n"
        "def weave(a, b):\n    out = []\n    for i in range(len(a)):\n        out.append(a[i])\n"
        "        if i < len(b):\n            out.append(b[i])\n    return ''.join(out)\n"
        "def unpack(text, decode=base64.b64decode):\n    return zlib.decompress(decode(text)).decode()\n"
        "def main():\n    source = unpack(weave(A, B))\n    exec(source, {'__name__': '__main__'})\nmain()",
        "characters xor 90": f"key = 90\nexec(''.join(chr(c ^ key) for c in {[c ^ 90 for c in content]}))",
        "reversed chunks in a class": "import zlib\nfrom base64 import b85decode as d\nclass P:\n"
        f"    parts = [{b85(small)}[::-1]]\n"
        "    @staticmethod\n    def go(x):\n        return zlib.decompress(d(x[::-1]))\n"
        "exec(P.go(P.parts[0]))",
        "exec under another name": f"import builtins\nrun = getattr(builtins, 'ex' + 'ec')\nrun({content.decode()!r})",
        "exec found in a dictionary": f"import zlib\n(lambda r: r(zlib.decompress({small!r})))(exec)",
        "imported by text": f"z = __import__('zlib')\nexec(z.decompress(__import__('base64').b64decode({b64(small)})))",
        "written, then run": "import base64, zlib, os, tempfile, runpy\n"
        "path = os.path.join(tempfile.gettempdir(), 'x.py')\nwith open(path, 'wb') as f:\n"
        f"    f.write(zlib.decompress(base64.b64decode({b64(small)})))\nrunpy.run_path(path, run_name='__main__')",
        "started as a program": f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {content.decode()!r}])",
        "in a function that nobody calls with constants": "import zlib, sys\n"
        f"def go(argv):\n    exec(zlib.decompress({small!r}))\n"
        "if __name__ == '__main__':\n    go(sys.argv)",
    }


@pytest.mark.parametrize("shape", packed(INNER.encode()))
def test_a_packed_script_is_unpacked_as_text(shape: str, tmp_path: Path) -> None:
    script = read(tmp_path, packed(INNER.encode())[shape])
    assert [layer.script.text for layer in script.layers] == [INNER], script.opaque
    assert script.layers[0].script.path == "train_gpt.py!inner"
    assert script.layers[0].script.tree is not None
    assert script.opaque == ()


@pytest.mark.parametrize("leave", ["break", "return"])
def test_what_comes_after_a_loop_that_nobody_knows_the_end_of_is_read(leave: str, tmp_path: Path) -> None:
    """A training loop with a clock that ends it: of `while True` one turn is enough where it may have been left."""
    loop = f"def train(step):\n    while True:\n        step = step + 1\n        if clock():\n            {leave}\n"
    inner = b64(zlib.compress(INNER.encode()))
    run = f"train(0)\nimport base64, zlib\nexec(zlib.decompress(base64.b64decode({inner})))\n"
    script = read(tmp_path, f"from time import time as clock\n{loop}\n{run}")
    assert [layer.script.text for layer in script.layers] == [INNER], script.opaque


def test_layers_within_layers_are_read_to_the_last(tmp_path: Path) -> None:
    text = INNER
    for shape in ("brotli", "raw lzma, base85, one line", "hex and codecs"):
        text = packed(text.encode())[shape]
    paths = [script.path for script in read(tmp_path, text).all()]
    assert paths[-1] == "train_gpt.py!inner!inner!inner"
    assert list(read(tmp_path, text).all())[-1].text == INNER


def test_what_runs_is_never_executed(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    text = f"open({str(trap)!r}, 'w').write('x')\nimport os\nos.system('touch {trap}')\n"
    text += f"exec('open({str(trap)!r}, \"w\")')\n"
    read(tmp_path, text + f"class A:\n    def __init__(self):\n        open({str(trap)!r}, 'w')\nA()\n")
    assert not trap.exists()


@pytest.mark.parametrize(
    "text",
    [
        "import os\nexec(os.environ['CODE'])\n",
        "import marshal, base64\nexec(marshal.loads(base64.b64decode('4wAAAA==')))\n",
        "import requests\nexec(requests.get('http://x').text)\n",
        "exec(open('not_here.py').read())\n",
        "import zlib\nexec(zlib.decompress(b'no zlib at all'))\n",
        "import random\nn = 0\nwhile True:\n    n += 1\nexec(n)\n",
    ],
)
def test_what_stays_closed_is_said_with_its_line(text: str, tmp_path: Path) -> None:
    script = read(tmp_path, text)
    assert [gap.line for gap in script.opaque] == [text.count("\n")]


@pytest.mark.parametrize(
    "text",
    [
        "import torch\nmodel.eval()\nmodel = torch.compile(model)\nre.compile('x')\n",
        "import subprocess\nprint(subprocess.run(['nvidia-smi'], capture_output=True).stdout)\n",
        "if False:\n    exec(payload)\n",
        "from pathlib import Path\nsource = Path(__file__).read_text()\nprint(source)\n",
    ],
)
def test_an_ordinary_script_is_not_called_opaque(text: str, tmp_path: Path) -> None:
    script = read(tmp_path, text)
    assert (script.opaque, script.layers) == ((), ())


def test_a_circle_of_imports_ends(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import b\nexec(open('train_gpt.py').read())\n")
    (tmp_path / "b.py").write_text("import a\nimport train_gpt\n")
    script = read(tmp_path, "import a\n")
    assert sorted(each.path for each in script.all()) == ["a.py", "b.py", "train_gpt.py"]


def test_files_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("SECRET = 1\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.py").symlink_to(tmp_path / "secret.py")
    script = read(tmp_path / "in", "exec(open('../secret.py').read())\nexec(open('link.py').read())\nimport link\n")
    assert script.layers == ()
    assert len(script.opaque) == 2


# Bounds.

BOMB = bytes(60_000_000)


def bomb(module: str, content: bytes) -> str:
    return f"import {module}\nexec({module}.decompress({content!r}))"


@pytest.mark.parametrize(
    ("label", "make"),
    [
        ("zlib bomb", lambda: bomb("zlib", zlib.compress(BOMB))),
        ("lzma bomb", lambda: bomb("lzma", lzma.compress(BOMB, preset=0))),
        ("brotli bomb", lambda: bomb("brotli", brotli.compress(BOMB, quality=1))),
        ("bz2 bomb", lambda: bomb("bz2", bz2.compress(BOMB, 1))),
        ("a long text", lambda: "exec('a' * 10**12)"),
        ("a wide format", lambda: "exec('%999999999d' % 1)\n"),
        ("a power", lambda: "exec(str(9 ** 9 ** 9))"),
        ("a shift", lambda: "exec(str(1 << 10 ** 12))"),
        ("doubling", lambda: "x = 'a'\nfor i in range(200):\n    x = x + x\nexec(x)"),
        ("by replacing", lambda: "x = 'a'\nfor i in range(200):\n    x = x.replace('a', 'aaaaaaaaaa')\nexec(x)"),
        ("many bytes", lambda: "exec(bytes(10 ** 12))"),
        ("a long range", lambda: "exec(''.join(str(i) for i in range(10 ** 12)))"),
        ("calls without end", lambda: "def f(x):\n    return f(x + 1)\nexec(f(0))"),
        ("branching calls", lambda: "def f(n):\n    return f(n - 1) + f(n - 1)\nexec(str(f(40)))"),
        ("its own text again", lambda: "s = 's = %r\\nexec(s %% s)'\nexec(s % s)"),
    ],
)  # fmt: skip
def test_no_script_costs_more_than_the_bounds(label: str, make: Callable[[], str], tmp_path: Path) -> None:
    text, started = make(), time.process_time()
    script = read(tmp_path, text)
    assert time.process_time() - started < 8
    assert all(len(each.text) <= bounds.UNPACKED_BYTES for each in script.all())
    assert len(list(script.all())) <= bounds.LAYERS + 1
    assert script.layers or script.opaque


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"import os\nprint 'hello'\n", 2, "Python 2"),
        (b"try:\n    x()\nexcept IOError, e:\n    pass\n", 3, "Python 2"),
        (b"x = 1\ny = 0777\n", 2, "Python 2"),
        (b"x = 1\nif x <> 2:\n    pass\n", 2, "Python 2"),
        (b"x = 1\ndef f(:\n", 2, "not Python 3"),
        (b"x = 1\n\ny = \"never closed\n", 3, "not Python 3"),
        (b"x = 1\ny = 2\0\n", 2, "NUL"),
        (b"x = 1\ny = '\xff\xfe'\n", 2, "0xff"),
        (b"# -*- coding: klingon -*-\nx = 1\n", 1, "coding"),
        (b"# coding: hex\nx = 1\n", 1, "coding"),
        (b"x = 1\ny = " + b"(" * 5000 + b")" * 5000, 2, "nested"),
        (b"x = 1\ny = " + b"-" * 100_000 + b"1\n", 2, "nested"),
        (b"x = 1\ny = " + b"1 + " * 20_000 + b"1\n", 2, "nested"),
        (b"x = 1\ny = x" + b".a" * 400 + b"\n", 2, "nested"),
        (b"x = 1\n" + b"".join(b" " * i + b"if x:\n" for i in range(120)), 102, "nested"),
        (b"x = 1\ny = " + b"9" * 10_000 + b"\n", 2, "not Python 3"),
        (b"x = 1\ny = [" + b"1," * 700_000 + b"]\n", 2, "characters of code"),
        (b"\x7fELF\x02\x01\x01" + bytes(200), 1, "NUL"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_its_line(content: bytes, line: int, says: str, tmp_path: Path) -> None:
    script = read(tmp_path, content)
    assert script.unreadable is not None
    assert (script.tree, script.unreadable.line, says in script.unreadable.why) == (None, line, True), script.unreadable


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfx = 'with a byte-order mark'\n",
        "# -*- coding: latin-1 -*-\nx = 'caf\xe9'\n".encode("latin-1"),
        b"x = 1\r\ny = 2\r\n",
        b"",
        b"x = '\\d'\n",
        b"blob = '" + b"A" * 12_000_000 + b"'\n",
        b"table = [" + b"1," * 200_000 + b"]\n",
    ],
    ids=["mark", "latin-1", "crlf", "empty", "escape", "12 MB of text", "a long table"],
)
def test_what_python_reads_is_read(content: bytes, tmp_path: Path) -> None:
    script = read(tmp_path, content)
    assert script.unreadable is None
    assert isinstance(script.tree, ast.Module)


def test_the_cells_of_a_notebook_are_one_script_with_the_lines_of_the_file(tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# def not_code("]},
        {"cell_type": "code", "source": ["%matplotlib inline\n", "!pip install x\n", "import torch\n", "x = 'é'"]},
        {"cell_type": "code", "source": "%%bash\nls -l"},
        {"cell_type": "code", "source": ["y = undefined_here"]},
    ]
    raw = json.dumps({"cells": cells, "nbformat": 4}, indent=1)
    script = read(tmp_path, raw, "book.ipynb")
    assert script.tree is not None
    rows = raw.split("\n")
    for number, row in enumerate(script.text.split("\n"), 1):
        if row in ("import torch", "y = undefined_here"):
            assert row in rows[script.line(number) - 1]
    broken = read(tmp_path, raw.replace("import torch", "import ("), "broken.ipynb")
    assert broken.unreadable is not None
    assert "import (" in rows[broken.line(broken.unreadable.line) - 1].replace("import torch", "import (")
    assert read(tmp_path, "{ no json", "c.ipynb").unreadable is not None
    assert read(tmp_path, "[1]", "d.ipynb").unreadable is not None


# Submissions.


def test_the_entry_is_what_the_command_runs_where_it_has_no_usual_name(tmp_path: Path) -> None:
    (tmp_path / "model_defs.py").write_text("x = 1\n" * 100)
    (tmp_path / "go.py").write_text("import model_defs\n")
    (tmp_path / "README.md").write_text("```\nA=1 torchrun --standalone --nproc_per_node=8 go.py\n```\n")
    submission = opened(tmp_path)
    assert [script.path for script in submission.scripts] == ["go.py", "model_defs.py"]
    assert not submission.record
    (tmp_path / "train_gpt.py").write_text("pass\n")
    assert opened(tmp_path).entry.path == "train_gpt.py"


def test_a_lone_script_takes_only_what_it_reaches(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import b\n")
    (tmp_path / "b.py").write_text("y = 1\n")
    (tmp_path / "c.py").write_text("z = 1\n")
    assert dict(opened(tmp_path / "a.py").sizes) == {"a.py": 9, "b.py": 6}
