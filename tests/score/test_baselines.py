"""General compressors on the same text, against their own decompressors and command-line formats."""

import bz2
import importlib
import lzma
import subprocess

import pytest

from fairway.base.errors import DataError
from fairway.base.journal import Run
from fairway.score import baselines as compute
from fairway.score import baselines_with_train
from fairway.score.baselines import _zstd, _zstd_module

from .conftest import text_of


def test_each_is_eight_times_its_file_over_the_text():
    text = text_of(10_000, 20_000)
    found = compute(text)
    assert list(found) == ["xz", "zstd", "brotli", "bzip2"]
    assert found["xz"] == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)
    assert found["bzip2"] == 8 * len(bz2.compress(text, 9)) / len(text)
    assert all(value is not None and 1 < value < 8 for value in found.values())


def test_what_zstd_writes_decodes_to_the_text():
    zstd, train, text = _zstd_module(), text_of(0, 40_000), text_of(50_000, 9_000)
    options = {zstd.DecompressionParameter.window_log_max: 31}
    assert zstd.decompress(_zstd(text, b""), options=options) == text
    known = zstd.ZstdDict(train, is_raw=True).as_prefix
    assert zstd.decompress(_zstd(text, train), zstd_dict=known, options=options) == text


def test_a_known_training_text_pays_off_as_far_back_as_it_reaches():
    """The text stands at the very start of 3 MB of training text: a window that is too short would not find it."""
    filler = b"".join(i.to_bytes(4, "big") * 3 for i in range(250_000))
    text = text_of(20_000, 5_000)
    alone, known = compute(text)["zstd"], baselines_with_train(text, text + filler)["zstd"]
    assert alone is not None
    assert known is not None
    assert known < alone / 20


def test_xz_agrees_with_the_command_line(tmp_path):
    text = text_of(10_000, 20_000)
    try:
        done = subprocess.run(["xz", "-9e", "-c"], input=text, capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no xz on this machine")
    assert compute(text)["xz"] == pytest.approx(8 * len(done.stdout) / len(text), rel=1e-3)


def test_a_missing_package_is_null_and_a_fact(monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name == "brotli":
            raise ModuleNotFoundError("No module named 'brotli'", name="brotli")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    run = Run()
    found = compute(b"some text " * 50, run)
    assert found["brotli"] is None
    assert found["xz"] is not None
    assert run.facts["baseline_brotli"] == {"missing": "brotli", "remedy": "pip install brotli"}


def test_an_empty_text_has_no_bits_per_byte():
    with pytest.raises(DataError, match="empty text"):
        compute(b"")
