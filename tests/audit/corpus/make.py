"""Builds a corpus of submissions out of its short form: scripts (`bases/`, `hands/`) and the cases that alter them.

    python tests/audit/corpus/make.py tests/audit/corpus/tuning OUT

OUT then holds one folder per case, as a submission would lie there (train_gpt.py, README.md, submission.json, logs),
and `cases.toml`, which says what an audit must find in each. Nothing of it is ever run.

The short form is text, many cases to a file (`*.cases`), so that a fault is seen as what it changes:

    ##### plain-rescore                   the case's name
    base: plain                           the script it alters: bases/plain.py or hands/plain.py of this part or above,
                                          or `=NAME`: the script of an earlier case
    violates: rescoring-after-adaptation  the rule broken; `or:` others that fairly describe it; none: a clean case
    exempt: adaptation-order-race         an accepted departure: clean or suspect, but a violation when strict
    may: twice-counted-tokens             rules whose accusation is neither asked for nor wrong
    at: rescored = evaluate(              text of the line at fault (`at: FILE :: TEXT` elsewhere); default: all changes
    style: helper                         in which manner the fault is written
    wrap: lzma85                          the script extracts itself: lzma85, zlib64, brotli85, nested
    blob: final_model.ptz 15500000        a file of so many bytes beside it
    log: a.log seed=7 bpb=1.1175          a log as the plain script writes it, with these figures (see LOG)
    cannot: opaque-code                   rules whose right answer is "cannot tell"
    <<<<                                  find this text (it must stand there exactly once) ...
    ====
    >>>>                                  ... and put this in its place; `<<<< after`, `<<<< before`: add it there
    %%%% README.md                        the text of another file; @CODE_BYTES@, @TOTAL_BYTES@ and
    @MODEL_BYTES@ are filled in
"""

import base64
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = "train_gpt.py"
LISTS = ("violates", "or", "exempt", "may", "cannot")
LOG_DEFAULTS = {
    **dict(
        seed="1337",
        steps="6874",
        ms="586012",
        avg="85.25",
        calib="6800",
        params="26993756",
    ),
    **dict(model="@MODEL_BYTES@", code="@CODE_BYTES@", total="@TOTAL_BYTES@", loss="1.88804100", bpb="1.11816000"),
    **dict(round_s="3.1", slide_s="92.4", ttt_s="291.0", tokens="62021632", extra="", world="8"),
}
LOG = """\
Running Python 3.11.9 (main)
Running PyTorch 2.9.1+cu128
val_loader:shards pattern=./data/datasets/fineweb10B_sp1024/fineweb_val_*.bin tokens:{tokens}
model_params:{params}
world_size:{world} grad_accum_steps:1 seed:{seed}
warmup_step:20/20
step:0/20000 val_loss:6.9310 val_bpb:4.1048 train_time:0ms step_avg:0.02ms
step:500/20000 train_loss:2.3894 train_time:42625ms step_avg:85.25ms
step:4000/20000 val_loss:2.0541 val_bpb:1.2165 train_time:341000ms step_avg:85.25ms
step:{steps}/20000 val_loss:1.9241 val_bpb:1.1395 train_time:{ms}ms step_avg:{avg}ms
stopping_early: wallclock_cap train_time:{ms}ms step:{steps}/20000
peak memory allocated: 21345 MiB
ema: applying EMA weights
gptq:calibration on train shards took {calib}ms, train+gptq {both}ms
Serialized model zstd: {model} bytes
Code size: {code} bytes
Total submission size: {total} bytes
final_roundtrip val_loss:1.9301 val_bpb:1.1431 eval_time:{round_ms}ms
final_sliding_window val_loss:1.8922 val_bpb:1.1206 stride:64 eval_time:{slide_ms}ms
final_sliding_window_exact val_loss:1.89220000 val_bpb:1.12062200
legal_ttt val_loss:{short_loss} val_bpb:{short_bpb} eval_time:{ttt_ms}ms
legal_ttt_exact val_loss:{loss} val_bpb:{bpb}
"""


class CorpusError(ValueError):
    """A case that cannot be built: the file, the case and what is wrong with it."""


@dataclass(frozen=True)
class Edit:
    kind: str  # "", "after", "before", "all"
    find: str
    put: str


@dataclass
class Case:
    """One submission in short form."""

    name: str
    source: str
    base: str = ""
    style: str = ""
    note: str = ""
    wrap: str = ""
    lists: dict[str, list[str]] = field(default_factory=dict)
    marks: list[str] = field(default_factory=list)
    blobs: list[tuple[str, int]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Spot:
    """A line at fault: its file, its number from 1 and its text."""

    file: str
    line: int
    text: str


# ---- reading the short form


def read_cases(path: Path) -> Iterator[Case]:
    """The cases of one file, in order. A file holds nothing before its first `#####`."""
    for block in re.split(r"^##### ", path.read_text(encoding="utf-8"), flags=re.M)[1:]:
        yield read_case(block, path.name)


def read_case(block: str, source: str) -> Case:
    lines = block.split("\n")
    case = Case(lines[0].strip(), source)
    i = 1
    while i < len(lines):
        line = lines[i]
        if line.startswith("<<<<"):
            middle = lines.index("====", i)
            end = lines.index(">>>>", middle)
            put = "\n".join(lines[middle + 1 : end])
            case.edits.append(Edit(line[4:].strip(), "\n".join(lines[i + 1 : middle]), put))
            i = end + 1
        elif line.startswith("%%%% "):
            end = next((j for j in range(i + 1, len(lines)) if lines[j].startswith(("%%%% ", "<<<<"))), len(lines))
            case.files[line[5:].strip()] = "\n".join(lines[i + 1 : end]).rstrip("\n") + "\n"
            i = end
        else:
            read_header(case, line)
            i += 1
    return case


def log_text(figures: dict[str, str]) -> str:
    """A log of the plain script. figures: what differs from LOG_DEFAULTS."""
    if unknown := set(figures) - set(LOG_DEFAULTS):
        raise CorpusError(f"a log has no {', '.join(sorted(unknown))}")
    f = {**LOG_DEFAULTS, **figures}
    spans = {f"{part}_ms": str(round(1000 * float(f[f"{part}_s"]))) for part in ("round", "slide", "ttt")}
    short = {f"short_{name}": f"{float(f[name]):.4f}" for name in ("loss", "bpb")}
    return LOG.format(**f, **spans, **short, both=int(f["ms"]) + int(f["calib"])) + f["extra"].replace("~", " ")


def read_header(case: Case, line: str) -> None:
    if not line.strip():
        return
    key, colon, value = line.partition(": ")
    value = value.strip()
    if key in LISTS:
        case.lists.setdefault(key, []).extend(word.strip() for word in value.split(",") if word.strip())
    elif key == "at":
        case.marks.append(value)
    elif key == "log":
        name, *figures = value.split()
        case.files[name] = log_text(dict(figure.split("=", 1) for figure in figures))
    elif key == "blob":
        name, size = value.split()
        case.blobs.append((name, int(size)))
    elif colon and key in ("base", "style", "note", "wrap"):
        setattr(case, key, value)
    else:
        raise CorpusError(f"{case.source}: {case.name}: cannot read {line!r}")


# ---- building a case


def find_base(name: str, part: Path) -> str:
    for folder in (part / "hands", part / "bases", HERE / "hands", HERE / "bases"):
        if (folder / f"{name}.py").is_file():
            return (folder / f"{name}.py").read_text(encoding="utf-8")
    raise CorpusError(f"no script {name}.py in hands or bases")


def altered(case: Case, text: str) -> tuple[str, list[int]]:
    """The script with the case's edits, and the numbers of the lines they added (or removed)."""
    marked = text
    for number, edit in enumerate(case.edits):
        count = marked.count(edit.find)
        if (count != 1 and edit.kind != "all") or not count:
            raise CorpusError(
                f"{case.source}: {case.name}: edit {number + 1} is found {count} times: {edit.find[:80]!r}"
            )
        put = "\n".join("\x00" + line for line in edit.put.split("\n"))
        if edit.kind == "after":
            put = edit.find + "\n" + put
        elif edit.kind == "before":
            put = put + "\n" + edit.find
        marked = marked.replace(edit.find, put)
    lines = marked.split("\n")
    touched = [i for i, line in enumerate(lines, 1) if "\x00" in line]
    return marked.replace("\x00", ""), touched


def spots(case: Case, texts: dict[str, str], touched: list[int]) -> list[Spot]:
    """Where the fault may be shown: the marked lines, else every line that the case touches and that is not empty."""
    if not case.marks:
        lines = texts[SCRIPT].split("\n")
        return [Spot(SCRIPT, i, lines[i - 1].strip()) for i in touched if lines[i - 1].strip()]
    found = []
    for mark in case.marks:
        file, _, text = mark.rpartition(" :: ")
        file = file or SCRIPT
        hits = [i for i, line in enumerate(texts[file].split("\n"), 1) if text in line]
        if not hits:
            raise CorpusError(f"{case.source}: {case.name}: the mark {mark!r} stands nowhere in {file}")
        found += [Spot(file, i, text) for i in hits]
    return found


def brotli_compress(raw: bytes) -> bytes:
    import brotli

    return bytes(brotli.compress(raw))


def wrapped(kind: str, text: str) -> str:
    """The script as one that extracts itself, in one of the manners seen."""
    raw = text.encode()
    if kind == "lzma85":
        body = base64.b85encode(lzma.compress(raw)).decode()
        return f'import base64 as b, lzma as l\nexec(l.decompress(b.b85decode("{body}")))\n'
    if kind == "zlib64":
        body = "\n".join(re.findall(".{1,100}", base64.b64encode(zlib.compress(raw, 9)).decode()))
        head = f'import zlib, base64\nS = """\n{body}\n"""\n'
        return head + 'code = zlib.decompress(base64.b64decode(S))\nexec(compile(code, "t", "exec"))\n'
    if kind == "brotli85":
        body = base64.b85encode(brotli_compress(raw)).decode()
        return f"import brotli as B,base64 as D\nexec(B.decompress(D.b85decode({body!r})).decode(),globals())\n"
    if kind == "nested":
        return wrapped("lzma85", wrapped("zlib64", text))
    raise CorpusError(f"no such wrap: {kind}")


_GOES_ON = re.compile(r"[\s)\]}#]|(?:else|elif|except|finally)\b|$")


def check(text: str, touched: list[int], name: str) -> None:
    """Raises SyntaxError where a script is no Python. touched: the lines that differ from a script which is; then only
    the statements around them are read, which takes a tenth of the time."""
    lines = text.split("\n")
    begun = [1] + [
        number
        for number, line in enumerate(lines, 1)
        if not _GOES_ON.match(line) and not (number > 1 and lines[number - 2].startswith("@"))
    ]
    spans = {
        (max(at for at in begun if at <= line), min((at for at in begun if at > line), default=len(lines) + 1))
        for line in touched
    }
    try:
        for first, last in sorted(spans) or [(1, len(lines) + 1)]:
            compile("\n".join(lines[first - 1 : last - 1]), name, "exec")
    except SyntaxError:  # a text that begins at the left edge looks like a statement
        compile(text, name, "exec")


def build(case: Case, part: Path, out: Path, scripts: dict[str, str]) -> dict[str, object]:
    """Writes one case's folder; returns its entry of the manifest. scripts: by case, to which this one's is added."""
    texts = dict(case.files)
    touched: list[int] = []
    if case.base:
        base = scripts[case.base[1:]] if case.base.startswith("=") else find_base(case.base, part)
        texts[SCRIPT], touched = altered(case, base)
    if SCRIPT in texts:
        check(texts[SCRIPT], touched, f"{case.name}/{SCRIPT}")
        scripts[case.name] = texts[SCRIPT]
    places = spots(case, texts, touched) if case.lists.get("violates") else []
    if case.wrap:
        texts[SCRIPT] = wrapped(case.wrap, texts[SCRIPT])
    code = len(texts.get(SCRIPT, "").encode())
    total = code + sum(size for _, size in case.blobs)
    folder = out / case.name
    for name, text in texts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name != SCRIPT:
            text = (
                text.replace("@CODE_BYTES@", str(code))
                .replace("@TOTAL_BYTES@", str(total))
                .replace("@MODEL_BYTES@", str(total - code))
            )
        target.write_text(text, encoding="utf-8")
    for name, size in case.blobs:
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return {
        "name": case.name,
        "base": case.base or "own",
        "style": case.style,
        "note": case.note,
        "violates": case.lists.get("violates", []),
        "acceptable": case.lists.get("or", []),
        "exempt": case.lists.get("exempt", []),
        "may": case.lists.get("may", []),
        "cannot": case.lists.get("cannot", []),
        "places": [{"file": s.file, "line": s.line, "text": s.text} for s in places],
    }


def manifest(entries: list[dict[str, object]]) -> str:
    """cases.toml: JSON's strings and lists are TOML's too, tables inside lists are written inline."""

    def value(thing: object) -> str:
        if isinstance(thing, dict):
            return "{ " + ", ".join(f"{k} = {value(v)}" for k, v in thing.items()) + " }"
        if isinstance(thing, list):
            return "[" + ", ".join(value(v) for v in thing) + "]"
        return json.dumps(thing, ensure_ascii=True)

    blocks = (
        "\n".join(f"{key} = {value(entry[key])}" for key in entry if entry[key] not in ("", [])) for entry in entries
    )
    return "\n\n".join("[[case]]\n" + block for block in blocks) + "\n"


def make(part: Path, out: Path) -> int:
    """Builds every case of a part; returns how many. Raises CorpusError, SyntaxError."""
    entries: list[dict[str, object]] = []
    scripts: dict[str, str] = {}
    names: set[str] = set()
    for path in sorted(part.glob("*.cases")):
        for case in read_cases(path):
            if case.name in names:
                raise CorpusError(f"{path.name}: {case.name} stands twice")
            names.add(case.name)
            entries.append(build(case, part, out, scripts))
    (out / "cases.toml").write_text(manifest(entries), encoding="utf-8")
    return len(entries)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), Path(sys.argv[2])), "cases")
