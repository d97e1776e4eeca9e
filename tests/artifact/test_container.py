"""The file: what was sealed is what opens, and nothing else opens."""

import hashlib
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifact.conftest import DECODER, integers, same
from fairway.artifact import Sealed, container, open_artifact
from fairway.artifact.header import MOST_NUMBERS
from fairway.artifact.squeeze import squeeze, unsqueeze
from fairway.base import slots
from fairway.base.errors import ArtifactError, ContractError, FairwayError, RecipeError
from fairway.data.tokenizer import Tokenizer
from fairway.model import ModelSpec
from fairway.quant import Quantized, Tensors

Seal = Callable[..., Sealed]
START = container.PRELUDE


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header's table, and the bytes of all sections."""
    content = path.read_bytes()
    length = int.from_bytes(content[8:12], "little")
    return json.loads(unsqueeze(content[START : START + length], 1 << 22)), content[START + length : -32]


def forge(path: Path, header: bytes, sections: bytes) -> None:
    """A file with another header, all its checksums right: what only a liar writes."""
    container._written(path, squeeze(header), {"all": sections})


@pytest.mark.parametrize("coder", slots.kinds("fairway.artifact.coder"))
def test_what_was_sealed_opens_to_the_bit(sealed: Seal, tensors: Tensors, spec: ModelSpec, coder: str) -> None:
    written = sealed(coder)
    opened = open_artifact(written.path)
    assert same(opened.tensors, tensors)
    assert opened.model_spec == spec
    assert opened.decoder == DECODER
    content = written.path.read_bytes()
    assert opened.sha256 == written.sha256 == hashlib.sha256(content).hexdigest()
    assert opened.bytes == written.bytes == len(content) == sum(written.sections.values())
    assert opened.sections == written.sections
    assert {"header", "codes.q.int2", "codes.v.int4", "codes.v.int5", "scales", "tokenizer"} <= set(written.sections)


def test_the_tokenizer_comes_back(sealed: Seal, tokenizer: Tokenizer) -> None:
    opened = open_artifact(sealed().path)
    assert opened.tokenizer.model == tokenizer.model
    assert opened.tokenizer.decode(tokenizer.encode(b"a line of text")) == b"a line of text"
    assert opened.vocab == tokenizer.size


def test_the_model_has_the_file_s_weights(sealed: Seal, tensors: Tensors) -> None:
    model = open_artifact(sealed("brotli").path).model("cpu")
    assert not model.training
    for name, parameter in model.named_parameters():
        value = tensors[name]
        expected = value.dequantize() if isinstance(value, Quantized) else value.astype(np.float32)
        assert parameter.dtype == torch.float32
        assert np.array_equal(parameter.detach().numpy(), expected)
    tokens = torch.arange(10)[None]
    logits = model.logits(model(tokens)[0])
    assert bool(torch.isfinite(logits).all())
    again = open_artifact(sealed("plain").path).model()
    assert torch.equal(again.logits(again(tokens)[0]), logits)


def test_the_same_integers_give_the_same_file(sealed: Seal) -> None:
    assert sealed("zstd").sha256 == sealed("zstd").sha256


def test_an_existing_file_is_replaced_whole_or_not_at_all(
    sealed: Seal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sealed()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FairwayError, match="No space left"):
        sealed("lzma")
    assert open_artifact(first.path).sha256 == first.sha256
    assert [file.name for file in tmp_path.iterdir()] == ["model.fw"]


def test_every_altered_byte_is_refused(sealed: Seal, tmp_path: Path) -> None:
    """Every byte of prelude, header and checksum, every fifth of the sections (a crc32 sees them all alike)."""
    content = sealed("brotli").path.read_bytes()
    altered = tmp_path / "altered.fw"
    header = START + int.from_bytes(content[8:12], "little")
    for place in {*range(header + 50), *range(header, len(content), 5), *range(len(content) - 50, len(content))}:
        altered.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match="section "):
            open_artifact(altered)


def test_every_truncation_is_refused(sealed: Seal, tmp_path: Path) -> None:
    content = sealed("brotli").path.read_bytes()
    cut = tmp_path / "cut.fw"
    for length in {*range(300), *range(300, len(content), 11), len(content) - 1}:
        cut.write_bytes(content[:length])
        with pytest.raises(ArtifactError, match="section "):
            open_artifact(cut)
    cut.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="section sections: too long"):
        open_artifact(cut)


def test_the_message_names_the_damaged_section(sealed: Seal) -> None:
    written = sealed("zstd")
    content = written.path.read_bytes()
    at = 0
    for section, stored in written.sections.items():
        place = at + stored - 1
        written.path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match=rf"model\.fw: section {section}: ") as caught:
            open_artifact(written.path)
        assert "\n" not in str(caught.value)
        at += stored


def test_other_files_are_refused(tmp_path: Path, sealed: Seal) -> None:
    path = tmp_path / "other.fw"
    for content in (b"", b"FAIR", b"PK\x03\x04" + bytes(300), b"\x80\x04\x95" + bytes(300)):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="no fairway artifact"):
            open_artifact(path)
    with pytest.raises(ArtifactError, match="No such file"):
        open_artifact(tmp_path / "absent.fw")
    with pytest.raises(ArtifactError, match="directory"):
        open_artifact(tmp_path)
    content = sealed().path.read_bytes()
    path.write_bytes(content[:7] + b"\x02" + content[8:])
    with pytest.raises(ArtifactError, match="section version: format 2, this fairway reads format 1"):
        open_artifact(path)


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("model", "layers", to=10**12), "layers, but"),
        (_set("model", "width", to=10**9 * 4), r"shape|cannot be built"),
        (_set("model", "hidden", to=2**61), r"shape|cannot be built"),
        (_set("model", "heads", to=3), "heads = 3 does not divide"),
        (_set("model", "attention", to="os"), "no such technique"),
        (_set("model", "attention", to={"kind": "../../os"}), "no such technique"),
        (_set("model", "surprise", to=1), "unknown key"),
        (_set("vocab", to=10**15), r"shape|cannot be built"),
        (_set("vocab", to=-5), r"shape|cannot be built"),
        (_set("vocab", to="many"), "vocab = 'many'"),
        (_set("coder", to="sys"), "no such technique"),
        (_set("groups", 0, "bits", to=9), "9 bits are impossible"),
        (_set("groups", 0, "tensors", 0, 1, to=10**14), "more than a file may hold"),
        (_set("groups", 0, "tensors", 0, 1, to=-1), "impossible"),
        (_set("groups", 0, "tensors", 0, 1, to=301), "shape"),
        (_set("groups", 0, "tensors", 0, to=[]), r"groups\[0\]"),
        (_set("groups", to=[]), "layers|section|tensor"),
        (_set("float16", 0, 1, to=[2**40]), "more than a file may hold"),
        (_set("float16", 0, 0, to="surprise"), "tensor "),
        (_set("sections", 0, 1, to=10**10), "cut short"),
        (_set("sections", 0, 1, to=-1), "negative length"),
        (_set("sections", 0, 0, to="surprise"), "sections"),
        (_set("tokenizer", to="0" * 64), "not the one that the header names"),
        (lambda table: table.pop("decoder"), "decoder is missing"),
        (lambda table: table.clear(), "missing|sections"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_spent(
    sealed: Seal, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    written = sealed("brotli")
    table, sections = header_of(written.path)
    change(table)
    forge(written.path, json.dumps(table).encode(), sections)
    tracemalloc.start()
    with pytest.raises(ArtifactError, match=words):
        open_artifact(written.path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"1", b"{", b"\xff\xfe", b'{"model": NaN}', b"9" * 5000])
def test_a_header_that_is_no_table_is_refused(sealed: Seal, text: bytes) -> None:
    written = sealed()
    forge(written.path, text, b"")
    with pytest.raises(ArtifactError, match="section header"):
        open_artifact(written.path)


def test_codes_that_leave_the_grid_are_refused(sealed: Seal) -> None:
    """A plain group whose packed bits are all ones: code 2^b − 1 is above the largest."""
    written = sealed("plain")
    table, sections = header_of(written.path)
    name, stored, _ = table["sections"][0]
    table["sections"][0][2] = zlib.crc32(b"\xff" * stored)
    forge(written.path, json.dumps(table).encode(), b"\xff" * stored + sections[stored:])
    with pytest.raises(ArtifactError, match=f"section {name}: "):
        open_artifact(written.path)


def test_a_float16_that_is_not_finite_is_refused(sealed: Seal, tensors: Tensors) -> None:
    name = next(name for name, value in tensors.items() if not isinstance(value, Quantized))
    poisoned = {**tensors, name: np.full_like(tensors[name], np.nan)}
    with pytest.raises(ArtifactError, match="section float16: a number is not finite"):
        open_artifact(sealed(tensors=poisoned).path)


def test_the_wrong_tensors_cannot_be_sealed(sealed: Seal, tensors: Tensors, tmp_path: Path) -> None:
    name = "blocks.0.attention.q.weight"
    less = {key: value for key, value in tensors.items() if key != name}
    more = {**tensors, "surprise": np.zeros(3, np.float16)}
    wide = {**tensors, name: Quantized(np.zeros((8, 9), np.int8), np.ones(8, np.float16), 5)}
    single = {**tensors, name: np.zeros((8, 8), np.float32)}
    for wrong, words in ((less, name), (more, "surprise"), (wide, name), (single, "not float16")):
        with pytest.raises(ContractError, match=words):
            sealed(tensors=wrong)
    assert not list(tmp_path.iterdir())


def test_a_decoder_s_table_must_be_plain(sealed: Seal) -> None:
    for table in ({"score": {"temperature": math.nan}}, {"score": {1, 2}}):
        with pytest.raises(RecipeError, match="decoder: "):
            sealed(decoder=table)


def test_a_tokenizer_of_another_size_is_refused(sealed: Seal, spec: ModelSpec, tokenizer: Tokenizer) -> None:
    written = sealed(tensors=integers(spec, 310), vocab=310)
    with pytest.raises(ArtifactError, match="section tokenizer: 300 pieces, but the model has 310 tokens"):
        open_artifact(written.path)


def test_the_limit_on_numbers_admits_the_challenge_s_models() -> None:
    assert MOST_NUMBERS > 10 * 73_700_000  # the largest of them, ternary
