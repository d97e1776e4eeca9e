"""Forms in the file: what was sealed opens to the bit, other files do not know of them, lies are named."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from artifact.conftest import same
from artifact.test_container import forge, header_of
from artifact.test_repair_section import an_addend
from fairway.artifact import Sealed, open_artifact
from fairway.artifact.integers import read_integers, write_integers
from fairway.base import slots
from fairway.base.errors import ArtifactError, DataError
from fairway.quant import Quantized, Tensors
from fairway.quant.books import lloyd_max
from fairway.quant.forms import NONE, Form, Formed

Seal = Callable[..., Sealed]
BOOK = lloyd_max(3)
FORMS = {
    "embedding.weight": Form(7, ()),
    "blocks.0.mlp.up.weight": Form(0, BOOK),
    "blocks.1.mlp.up.weight": Form(NONE, BOOK),
}


def a_formed(value: Quantized, form: Form) -> Formed:
    limit = len(form.levels) or 127
    codes = np.where(value.codes == 0, np.int8(1), np.clip(value.codes, -limit, limit)) if form.levels else value.codes
    return Formed(codes, value.scales, value.bits, form=form)


@pytest.fixture
def formed(tensors: Tensors) -> Tensors:
    found = dict(tensors)
    for name, form in FORMS.items():
        value = found[name]
        assert isinstance(value, Quantized)
        found[name] = a_formed(value, form)
    return found


def forms(tensors: Tensors) -> dict[str, Form]:
    return {name: value.form for name, value in tensors.items() if isinstance(value, Formed)}


@pytest.mark.parametrize("coder", slots.kinds("fairway.artifact.coder"))
def test_what_was_sealed_opens_to_the_bit(sealed: Seal, formed: Tensors, coder: str) -> None:
    written = sealed(coder, tensors=formed)
    opened = open_artifact(written.path)
    assert same(opened.tensors, formed)
    assert forms(opened.tensors) == FORMS
    model = opened.model()
    for name, value in formed.items():
        if isinstance(value, Formed):
            assert np.array_equal(model.get_parameter(name).detach().numpy(), value.dequantize())


def test_an_opened_file_is_sealed_to_the_same_bytes(sealed: Seal, formed: Tensors) -> None:
    written = sealed(tensors=formed)
    assert sealed(tensors=open_artifact(written.path).tensors).sha256 == written.sha256


def test_a_file_of_plain_steps_says_nothing_of_forms(sealed: Seal, formed: Tensors) -> None:
    assert "forms" not in header_of(sealed().path)[0]
    told = header_of(sealed(tensors=formed).path)[0]["forms"]
    assert {name: (seed, tuple(levels)) for name, seed, levels in told} == FORMS


def test_a_formed_tensor_may_be_repaired_too(sealed: Seal, formed: Tensors) -> None:
    name = "blocks.0.mlp.up.weight"
    value = formed[name]
    assert isinstance(value, Formed)
    mended = replace(value, repair=an_addend(value.shape, 2, 8, 0))
    opened = open_artifact(sealed(tensors={**formed, name: mended}).path).tensors[name]
    assert isinstance(opened, Formed)
    assert np.array_equal(opened.dequantize(), mended.dequantize())
    assert not np.array_equal(opened.dequantize(), value.dequantize())


def test_integers_keep_their_forms(tmp_path: Path, tensors: Tensors, formed: Tensors) -> None:
    path = tmp_path / "integers.safetensors"
    for written in (formed, tensors):
        write_integers(path, written)
        assert same(read_integers(path), written)
        assert forms(read_integers(path)) == forms(written)


def test_integers_of_a_form_that_is_none_are_no_run_s(tmp_path: Path, formed: Tensors) -> None:
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "integers.safetensors"
    write_integers(path, formed)
    with safe_open(path, framework="np") as file:
        about = json.loads(file.metadata()["integers"])
    about["forms"][0][1] = -5
    save_file(load_file(path), path, metadata={"integers": json.dumps(about)})
    with pytest.raises(DataError, match="seed -5"):
        read_integers(path)


NAME = "blocks.0.mlp.up.weight"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([NAME, -2, list(BOOK)], "seed -2"),
        ([NAME, 1 << 32, list(BOOK)], "seed 4294967296"),
        ([NAME, 0.5, list(BOOK)], "forms"),
        ([NAME, True, list(BOOK)], "forms"),
        ([NAME, -1, []], "neither levels nor a rotation"),
        ([NAME, 0, list(reversed(BOOK))], "do not rise"),
        ([NAME, 0, [BOOK[0], *BOOK]], "do not rise"),
        ([NAME, 0, [0.0, *BOOK]], "do not rise"),
        ([NAME, 0, [*BOOK[:-1], math.inf]], "no finite float16"),
        ([NAME, 0, [*BOOK[:-1], math.nan]], "no finite float16"),
        ([NAME, 0, [*BOOK[:-1], 1e300]], "no finite float16"),
        ([NAME, 0, [0.1, *BOOK[1:]]], "no finite float16"),
        ([NAME, 0, ["0.25", *BOOK[1:]]], "forms"),
        ([NAME, 0, list(BOOK[:-1])], "leave a book of ±3"),
        ([NAME, 0, [(i + 1) / 64 for i in range(32)]], "32 levels on int6's ±31"),
        ([NAME, 0, [1.0] * 100_000], "levels on int6's"),
        (["final_norm", 0, list(BOOK)], "has no codes"),
        (["nothing", 0, list(BOOK)], "has no codes"),
        (["embedding.weight", 0, []], "named twice"),
        ([NAME, 0], "forms"),
        ("all", "forms"),
    ],
)
def test_a_lying_header_is_refused_by_its_name(sealed: Seal, formed: Tensors, entry: Any, words: str) -> None:
    written = sealed(tensors=formed)
    table, sections = header_of(written.path)
    place = next(i for i, row in enumerate(table["forms"]) if row[0] == NAME)
    table["forms"][place] = entry
    forge(written.path, json.dumps(table).encode(), sections)
    with pytest.raises(ArtifactError, match=f"section header: .*{words}") as caught:
        open_artifact(written.path)
    assert "\n" not in str(caught.value)


def test_a_formed_file_of_an_earlier_day_gives_the_same_weights_to_the_bit() -> None:
    """Written on 2026-11-26 by `seal`, coder rans; the sums are those of every machine."""
    opened = open_artifact(Path(__file__).resolve().parents[1] / "golden" / "formed-v1.fw")
    assert forms(opened.tensors) == FORMS
    digest = hashlib.sha256()
    for name in FORMS:
        value = opened.tensors[name]
        assert isinstance(value, Formed)
        digest.update(value.dequantize().astype("<f4").tobytes())
    assert digest.hexdigest() == "9e6aa01f7cc46517cbb12a44c7eb633d635950e8e11677427d0f10c48d408d2c"
