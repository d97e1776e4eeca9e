"""Helper modules, kernels or a decoder outside the script, in no sum."""

import ast
import sys
from collections.abc import Iterator

from fairway.audit.case import Case
from fairway.audit.reading import Script
from fairway.audit.reading.tree import nodes
from fairway.audit.records import record_of
from fairway.audit.verdict import Finding, Place, Step

ID = "uncounted-code"
CHARGE = "Code outside the counted script is executed."
CLAUSE = "R1: all counted code lives in train_gpt.py; (c) code not counted"
WITHOUT_SCRIPT = False

_PACKAGES = """
    torch torchvision torchaudio torchao triton numpy scipy sentencepiece tiktoken tokenizers transformers datasets
    huggingface_hub tqdm wandb einops flash_attn flash_attn_interface flash_attn_3 hopper brotli brotlicffi
    zstandard zstd pyzstd lz4 blosc snappy constriction numba pandas pyarrow matplotlib psutil pynvml xformers
    bitsandbytes safetensors kernels cut_cross_entropy liger_kernel mamba_ssm causal_conv1d fla apex
    transformer_engine deepspeed accelerate cutlass cuda cupy jax jaxlib flax optax mlx tinygrad regex requests
    setuptools packaging typing_extensions heavyball muon python_minifier nltk sklearn backports compression ninja
    pybind11 lightning hydra omegaconf fire click rich yaml orjson msgpack zopfli zopflipy natten quack tilelang
    helion gemlite hqq optimum peft evaluate modal ray dotenv pydantic attr attrs cffi cython pyximport nvtx
    tensorboard dahuffman bitarray xxhash blake3 mup schedulefree soap sparsemax fairway
"""
KNOWN = set(sys.stdlib_module_names) | set(_PACKAGES.split())
"""What a script may import without handing it in: the standard library and the packages of this field."""

_SOURCES = (".cu", ".cuh", ".cpp", ".cc", ".c", ".h", ".so", ".pyx", ".pyc", ".sh", ".whl")


def check(case: Case) -> Finding:
    """Violates where files of the folder hold code that the entry executes and that no sum counts."""
    record = record_of(case.submission)
    outside = {**record.neighbours, **_named_sources(case)}
    if not outside:
        return _absent(case) or Finding(ID, "clean", "everything that is executed stands in the script itself", CLAUSE)
    spent = sum(outside.values())
    names = ", ".join(f"{path} ({size:,} bytes)" for path, size in sorted(outside.items()))
    counted = [amount.value for log in record.logs for amount in log.codes] + [record.claims.code or 0.0]
    if max(counted) >= record.code_bytes + spent or _counts_itself(case, outside):
        return Finding(ID, "clean", f"code outside the script is counted: {names}", CLAUSE)
    place, step = _used(case.script, outside)
    evidence = (
        f"{step.what}: {names} is executed and counted in no sum; R1 counts all code, which should live in one script"
    )
    return Finding(ID, "violates", evidence, CLAUSE, place, (step,))


def _named_sources(case: Case) -> dict[str, int]:
    """Sources in other languages and programs of the folder that the code names."""
    texts = {text for script in case.script.all() if script.tree for text, _ in _strings(script.tree)}
    files = {path: size for path, size in case.submission.sizes.items() if path.lower().endswith(_SOURCES)}
    return {path: size for path, size in files.items() if any(_names(text, path) for text in texts)}


def _names(text: str, path: str) -> bool:
    """Whether a string of the code is this file's name, alone or at the end of a path."""
    return len(text) < 300 and (text.rpartition("/")[2] == path.rpartition("/")[2])


def _strings(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(text, line) of every string literal."""
    for node in nodes(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, node.lineno


def _counts_itself(case: Case, outside: dict[str, int]) -> bool:
    """Whether the script weighs these files: a length or a size is taken of something that names each of them, or of a
    variable that was read from what names them."""
    named = set[str]()
    for script in case.script.all():
        read = dict(pair for node in nodes(script.tree) if isinstance(node, ast.Assign) for pair in _read_into(node))
        for node in nodes(script.tree):
            if _weighs(node):
                named |= _files_named(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len":
                inside = (each.id for each in nodes(node) if isinstance(each, ast.Name))
                named |= {name for variable in inside for name in read.get(variable, ())}
    return all(any(_names(name, path) or name == "*.py" for name in named) for path in outside)


def _read_into(node: ast.Assign) -> Iterator[tuple[str, set[str]]]:
    """(variable, files named in what it is given) where an assignment reads files."""
    for target in node.targets:
        pairs = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=False))
        for to, value in pairs:
            if isinstance(to, ast.Name) and _words(value) & {"read", "read_text", "read_bytes"}:
                yield to.id, _files_named(value)


def _files_named(node: ast.AST) -> set[str]:
    return {text for text, _ in _strings(node)} | {f"{module}.py" for module in _own_files(node)}


def _own_files(node: ast.AST) -> Iterator[str]:
    """Modules whose `__file__` stands in an expression."""
    for each in nodes(node):
        if isinstance(each, ast.Attribute) and each.attr == "__file__" and isinstance(each.value, ast.Name):
            yield each.value.id


def _weighs(node: ast.AST) -> bool:
    """A size: `getsize` or `stat` of a file, `sum(...)` or `len(...)` of files that are read or asked for theirs."""
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute):
        return node.func.attr in ("getsize", "stat")
    sized = isinstance(node.func, ast.Name) and node.func.id in ("sum", "len")
    return sized and bool(_words(node) & {"read_bytes", "read_text", "st_size", "getsize", "read", "stat"})


def _words(node: ast.AST) -> set[str]:
    """The attributes that an expression asks for."""
    return {each.attr for each in nodes(node) if isinstance(each, ast.Attribute)}


def _used(script: Script, outside: dict[str, int]) -> tuple[Place, Step]:
    """Where the code outside is first executed."""
    how = {"exec": "executes the text of", "import": "imports", "run": "runs"}
    for each in script.all():
        for layer in each.layers:
            path = next((path for path in (layer.script.path, layer.source) if path in outside), None)
            if path:
                place = Place(each.path, each.line(layer.line))
                return place, Step(place, f"{each.path} {how[layer.how]} {path}")
        for text, line in _strings(each.tree) if each.tree else ():
            path = next((path for path in outside if _names(text, path)), None)
            if path:
                place = Place(each.path, each.line(line))
                return place, Step(place, f"{each.path} names {path}")
    place = Place(script.path)
    return place, Step(place, f"{script.path} reaches {', '.join(outside)}")


def _absent(case: Case) -> Finding | None:
    """A script that only starts another one, or imports one, which was not handed in."""
    script = case.script
    for gap in script.opaque:
        if "not in the folder" in gap.why or (script.text.count("\n") < 20 and "open(" in gap.why):
            evidence = (
                f"{gap.why[:1].upper()}{gap.why[1:]}: the code that runs stands in another file than the counted one"
            )
            return Finding(ID, "suspect", evidence, CLAUSE, Place(script.path, script.line(gap.line)))
    for name, line in _imported(script.tree) if script.tree else ():
        evidence = f"it imports {name}, which is neither handed in nor a package that such scripts use"
        return Finding(ID, "suspect", evidence, CLAUSE, Place(script.path, script.line(line)))
    return None


def _imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Unknown modules that are imported whatever happens: at the top, in no try."""
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f".{node.module or ''}" if node.level else node.module or ""]
        for name in names:
            if name.split(".")[0] not in KNOWN:
                yield name, node.lineno
