"""Low-rank addends in the file: what was sealed opens to the bit, other files do not know of them, damage is named."""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifact.test_container import forge, header_of
from fairway.artifact import Sealed, open_artifact, repair
from fairway.artifact.integers import read_integers, write_integers
from fairway.artifact.squeeze import squeeze
from fairway.base import slots
from fairway.base.errors import ArtifactError, DataError
from fairway.quant import LowRank, Quantized, Tensors

Seal = Callable[..., Sealed]
MENDED = (("embedding.weight", 3, 64), ("blocks.1.mlp.up.weight", 1, 5))


def an_addend(shape: tuple[int, int], rank: int, group: int, seed: int) -> LowRank:
    chance = np.random.default_rng(seed)
    scales = chance.uniform(0.001, 0.1, -(-rank * shape[1] // group)).astype(np.float16)
    left = chance.integers(-2, 2, (shape[0], rank)).astype(np.int8)
    right = chance.integers(-8, 8, (rank, shape[1])).astype(np.int8)
    return LowRank(left, np.array([0.1], np.float16), right, scales, group)


@pytest.fixture
def mended(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for seed, (name, rank, group) in enumerate(MENDED):
        value = found[name]
        assert isinstance(value, Quantized)
        found[name] = replace(value, repair=an_addend(value.shape, rank, group, seed))
    return found


def same_addends(first: Tensors, second: Tensors) -> bool:
    parts = ("left", "left_scale", "right", "right_scales")
    for name, value in first.items():
        if not isinstance(value, Quantized):
            continue
        other = second[name]
        assert isinstance(other, Quantized)
        one, two = value.repair, other.repair
        if one is None or two is None:
            if one is not two:
                return False
        elif one.group != two.group or not all(np.array_equal(getattr(one, p), getattr(two, p)) for p in parts):
            return False
    return True


@pytest.mark.parametrize("coder", slots.kinds("fairway.artifact.coder"))
def test_what_was_sealed_opens_to_the_bit(sealed: Seal, mended: Tensors, coder: str) -> None:
    written = sealed(coder, tensors=mended)
    opened = open_artifact(written.path)
    assert same_addends(opened.tensors, mended)
    assert opened.bytes == written.bytes == sum(written.sections.values())
    assert written.sections["repair"] == opened.sections["repair"] > 0
    model = opened.model()
    for name, _, _ in MENDED:
        value = mended[name]
        assert isinstance(value, Quantized)
        assert value.repair is not None
        expected = replace(value, repair=None).dequantize() + value.repair.dequantize()
        assert np.array_equal(model.get_parameter(name).detach().numpy(), expected)


def test_a_file_without_repair_says_nothing_of_it(sealed: Seal, mended: Tensors) -> None:
    written = sealed()
    assert "repair" not in header_of(written.path)[0]
    assert "repair" not in written.sections
    assert header_of(sealed(tensors=mended).path)[0]["repair"] == [list(entry) for entry in MENDED]


def test_the_section_is_as_long_as_its_numbers(sealed: Seal, mended: Tensors) -> None:
    """2 bits for each of A, 4 for each of B, 16 for each scale; random numbers do not compress."""
    expected = 0
    for name, rank, group in MENDED:
        rows, cols = mended[name].shape
        expected += -(-rows * rank // 4) + -(-rank * cols // 2) + 2 * (1 + -(-rank * cols // group))
    assert expected <= sealed(tensors=mended).sections["repair"] <= expected + 5


def test_integers_keep_their_addends(tmp_path: Path, tensors: Tensors, mended: Tensors) -> None:
    path = tmp_path / "integers.safetensors"
    write_integers(path, mended)
    again = read_integers(path)
    assert same_addends(again, mended)
    assert list(again) == list(mended)
    write_integers(path, tensors)
    assert same_addends(read_integers(path), tensors)


def test_an_addend_off_its_grid_is_no_run_s_integers(tmp_path: Path, mended: Tensors) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "integers.safetensors"
    write_integers(path, mended)
    flat = load_file(path)
    flat["embedding.weight.repair.left"] = flat["embedding.weight.repair.left"] + np.int8(5)
    about = {"order": list(mended), "bits": {}, "repair": {}}
    for name, value in mended.items():
        if isinstance(value, Quantized):
            about["bits"][name] = value.bits  # type: ignore[call-overload]
            if value.repair is not None:
                about["repair"][name] = value.repair.group  # type: ignore[call-overload]
    save_file(flat, path, metadata={"integers": json.dumps(about)})
    with pytest.raises(DataError, match="repair: codes"):
        read_integers(path)


def _forged(path: Path, change: Callable[[dict[str, Any]], None], section: bytes | None = None) -> None:
    """The same file with another header and, where given, another section; all checksums right."""
    table, sections = header_of(path)
    change(table)
    if section is not None:
        start = 0
        for entry in table["sections"]:
            if entry[0] == "repair":
                sections = sections[:start] + section + sections[start + entry[1] :]
                entry[1:] = [len(section), zlib.crc32(section)]
                break
            start += entry[1]
    forge(path, json.dumps(table).encode(), sections)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([["embedding.weight", 3, 64], ["embedding.weight", 1, 5]], "section header: repair: a tensor .* named twice"),
        ([["nothing", 3, 64], ["blocks.1.mlp.up.weight", 1, 5]], "section header: repair: .* no codes"),
        ([["final_norm", 1, 1], ["blocks.1.mlp.up.weight", 1, 5]], "section header: repair: .* no codes"),
        ([["embedding.weight", 9, 64], ["blocks.1.mlp.up.weight", 1, 5]], "rank 9 in groups of 64 is impossible"),
        ([["embedding.weight", 0, 64], ["blocks.1.mlp.up.weight", 1, 5]], "rank 0"),
        ([["embedding.weight", -1, 64], ["blocks.1.mlp.up.weight", 1, 5]], "rank -1"),
        ([["embedding.weight", 3, 0], ["blocks.1.mlp.up.weight", 1, 5]], "groups of 0"),
        ([["embedding.weight", 3, 10**12], ["blocks.1.mlp.up.weight", 1, 5]], "groups of 10"),
        ([["embedding.weight", 2, 64], ["blocks.1.mlp.up.weight", 1, 5]], "section repair: .* expected|announces"),
        ([["embedding.weight", 4, 64], ["blocks.1.mlp.up.weight", 1, 5]], "section repair: .* expected"),
        ([], "section header: its sections are not those of its tensors"),
        ("all", "section header: repair"),
    ],
)
def test_a_lying_header_is_refused(sealed: Seal, mended: Tensors, entries: Any, words: str) -> None:
    written = sealed(tensors=mended)
    _forged(written.path, lambda table: table.update(repair=entries))
    with pytest.raises(ArtifactError, match=words):
        open_artifact(written.path)


def test_a_missing_section_is_refused(sealed: Seal) -> None:
    written = sealed()
    _forged(written.path, lambda table: table.update(repair=[["embedding.weight", 1, 8]]))
    with pytest.raises(ArtifactError, match="section header: its sections are not those of its tensors"):
        open_artifact(written.path)


def test_scales_that_are_none_and_bytes_left_over_are_refused(sealed: Seal, mended: Tensors) -> None:
    raw = b"".join(repair._to_bytes(value.repair) for value in mended.values() if getattr(value, "repair", None))
    wrong = {
        "a scale is negative or not finite": raw[:-1] + b"\xff",
        "expected": raw[:-2],
        "announces": raw + b"\0",
        "cut short": None,
    }
    for words, content in wrong.items():
        written = sealed(tensors=mended)
        _forged(written.path, lambda table: None, b"" if content is None else squeeze(content))
        with pytest.raises(ArtifactError, match=f"section repair: .*{words}"):
            open_artifact(written.path)


def test_a_repaired_file_of_an_earlier_day_gives_the_same_weights_to_the_bit() -> None:
    """Written on 2026-11-24 by `seal`, coder brotli; the sums are those of every machine."""
    opened = open_artifact(Path(__file__).resolve().parents[1] / "golden" / "repaired-v1.fw")
    digest = hashlib.sha256()
    for name, rank, group in MENDED:
        value = opened.tensors[name]
        assert isinstance(value, Quantized)
        assert value.repair is not None
        assert (len(value.repair.right), value.repair.group) == (rank, group)
        digest.update(value.dequantize().astype("<f4").tobytes())
    assert digest.hexdigest() == "e64a1bf0dbb24ef331eb0cb43690bf751ded42960255ae227eaff4044c97a759"


def test_unused_bits_must_be_zero() -> None:
    """One spelling for one addend: three codes of A leave a quarter of a byte, which says nothing."""
    assert repair._unpacked(bytes([0b00_01_10_11]), 2, -2, 3).tolist() == [1, 0, -1]
    with pytest.raises(ValueError, match="holds too many"):
        repair._unpacked(bytes([0b01_01_10_11]), 2, -2, 3)


def test_every_altered_byte_of_the_section_is_refused(sealed: Seal, mended: Tensors) -> None:
    written = sealed(tensors=mended)
    content, at = written.path.read_bytes(), 0
    for section, stored in written.sections.items():
        if section == "repair":
            break
        at += stored
    for place in range(at, at + written.sections["repair"], 7):
        written.path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        with pytest.raises(ArtifactError, match="section repair: damaged"):
            open_artifact(written.path)
