"""Broken and mutated scripts for the audit: what a disk, an editor, a copy and a malicious hand do to a text."""

import base64
import json
import random
import zlib
from collections.abc import Callable, Iterator

Mutation = Callable[[random.Random, bytes], bytes]


def cut_short(dice: random.Random, text: bytes) -> bytes:
    return text[: dice.randrange(len(text))]


def flipped(dice: random.Random, text: bytes) -> bytes:
    out = bytearray(text)
    for _ in range(dice.choice([1, 3, 30])):
        out[dice.randrange(len(out))] = dice.randrange(256)
    return bytes(out)


def with_a_zero(dice: random.Random, text: bytes) -> bytes:
    at = dice.randrange(len(text))
    return text[:at] + b"\0" + text[at:]


def without_lines(dice: random.Random, text: bytes) -> bytes:
    rows = text.split(b"\n")
    at = dice.randrange(len(rows))
    return b"\n".join(rows[:at] + rows[at + dice.choice([1, 2, 40]) :])


def shuffled(dice: random.Random, text: bytes) -> bytes:
    rows = text.split(b"\n")
    at, size = dice.randrange(len(rows)), dice.choice([2, 5, 60])
    part = rows[at : at + size]
    dice.shuffle(part)
    return b"\n".join([*rows[:at], *part, *rows[at + size :]])


def repeated(dice: random.Random, text: bytes) -> bytes:
    rows = text.split(b"\n")
    at, size = dice.randrange(len(rows)), dice.choice([1, 5, 60])
    return b"\n".join([*rows[: at + size], *rows[at : at + size], *rows[at + size :]])


def other_word(dice: random.Random, text: bytes) -> bytes:
    words = text.split(b" ")
    words[dice.randrange(len(words))] = words[dice.randrange(len(words))]
    return b" ".join(words)


def other_sign(dice: random.Random, text: bytes) -> bytes:
    at = dice.randrange(len(text))
    return text[:at] + dice.choice([b"(", b")", b"[", b":", b'"""', b"'", b"\\", b"#", b"\t", b"{", b"@"]) + text[at:]


def indented(dice: random.Random, text: bytes) -> bytes:
    rows = text.split(b"\n")
    at = dice.randrange(len(rows))
    rows[at] = dice.choice([b" ", b"\t", b"    "]) + rows[at]
    return b"\n".join(rows)


def python_2(dice: random.Random, text: bytes) -> bytes:
    rows = text.split(b"\n")
    rows.insert(dice.randrange(len(rows)), dice.choice([b"print 'done'", b"print x, y", b"exec 'x = 1'", b"x = 0777"]))
    return b"\n".join(rows)


def deep(dice: random.Random, text: bytes) -> bytes:
    count = dice.choice([90, 240, 3000, 60_000])
    made = [b"(" * count + b")" * count, b"-" * count + b"1", b"[" * count + b"]" * count, b"1" + b"+1" * count]
    made += [b"x" + b".a" * count, b"f" + b"()" * count, b"lambda: " * count + b"1", b"not " * count + b"x"]
    return text + b"\nlast = " + dice.choice(made) + b"\n"


def huge(dice: random.Random, text: bytes) -> bytes:
    made = [b"'" + b"A" * 3_000_000 + b"'", b"[" + b"1, " * 100_000 + b"]", b"9" * 100_000, b"10 ** 10 ** 10"]
    made += [
        b"'a' * 10 ** 12",
        b"list(range(10 ** 12))",
        b"{" + b"'k': [0], " * 20_000 + b"}",
        b"0x" + b"f" * 1_000_000,
    ]
    return text + b"\nlast = " + dice.choice(made) + b"\n"


def turning(dice: random.Random, text: bytes) -> bytes:
    """Recursion and loops without end, at the end where everything is known."""
    made = [
        b"def turn(x):\n    return turn(turn(x))\nturn(0)",
        b"while True:\n    pass",
        b"class Turn:\n    def __call__(self, x):\n        return self(x)\nTurn()(1)",
        b"a = []\na.append(a)\nb = {'a': a}\na.append(b)\nfor i in a:\n    a.append(i)",
        b"f = lambda g: g(g)\nf(f)",
        b"class A(B if 0 else object):\n    pass\nclass B(A):\n    pass\nA.x = B\nB.x = A\nA().x.x.x.x()",
        b"def one():\n    two()\ndef two():\n    one()\none()",
        b"x = x if x else (lambda: x)()\ndel x\nx.y.z = x",
        b"exec(open(__file__).read())",
        b"s = 's = %r\\nexec(s %% s)'\nexec(s % s)",
    ]
    return text + b"\n" + dice.choice(made) + b"\n"


def packed(dice: random.Random, text: bytes) -> bytes:
    """A self-extracting script, whole or with its data damaged."""
    blob = bytearray(base64.b85encode(zlib.compress(text)))
    if dice.random() < 0.7:
        blob[dice.randrange(len(blob))] = dice.randrange(33, 120)
    return b"import base64, zlib\nexec(zlib.decompress(base64.b85decode(" + repr(bytes(blob)).encode() + b")))\n"


def notebook(dice: random.Random, text: bytes) -> bytes:
    rows = [row + "\n" for row in text.decode("utf-8", "replace").split("\n")]
    cells = [{"cell_type": "code", "source": rows[at : at + 40]} for at in range(0, len(rows), 40)]
    raw = json.dumps({"cells": cells, "nbformat": 4}, indent=1).encode()
    return raw if dice.random() < 0.5 else cut_short(dice, raw)


def encoded(dice: random.Random, text: bytes) -> bytes:
    plain = text.decode("utf-8", "replace")
    made = [plain.encode("utf-16"), b"\xff\xfe" + text, b"# coding: rot13\n" + text, b"# coding: utf-7\n" + text]
    made += [
        b"\xef\xbb\xbf" + text,
        text.replace(b"\n", b"\r"),
        plain.encode("utf-32"),
        b"\xef\xbb\xbf# coding: ascii\n",
    ]
    return dice.choice(made)


def noise(dice: random.Random, text: bytes) -> bytes:
    return dice.randbytes(dice.choice([0, 1, 100, 50_000]))


MUTATIONS: tuple[Mutation, ...] = (
    cut_short, flipped, with_a_zero, without_lines, shuffled, repeated, other_word, other_sign, indented, python_2,
    deep, huge, turning, packed, notebook, encoded, noise,
)  # fmt: skip


def mutated(bases: list[bytes], count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name of a file, its content), `count` times: every mutation in turn, now and then two of them."""
    dice = random.Random(seed)
    for number in range(count):
        chosen = [MUTATIONS[number % len(MUTATIONS)]]
        if dice.random() < 0.25:
            chosen.insert(0, dice.choice(MUTATIONS))
        content = dice.choice(bases)
        for mutation in chosen:
            content = mutation(dice, content) if content else content
        suffix = "ipynb" if chosen[-1] is notebook else "py"
        yield f"{number:05d}_{'_'.join(each.__name__ for each in chosen)}.{suffix}", content
