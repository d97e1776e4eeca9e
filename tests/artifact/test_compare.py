"""The table of coders: what stands in it was written, and decoded again."""

import json

import numpy as np
import pytest

from fairway.artifact import PackSpec
from fairway.artifact.coder import brotli, context, plain, rans
from fairway.artifact.compare import NEAR, PLAIN, compare
from fairway.artifact.container import seal
from fairway.artifact.reorder import chain
from fairway.artifact.squeeze import squeeze
from fairway.base import slots
from fairway.base.errors import ContractError
from fairway.base.journal import Run
from fairway.quant import Quantized, Tensors


def test_every_group_and_coder_is_there_and_the_totals_are_the_file_s(tmp_path, tensors, spec, tokenizer) -> None:  # type: ignore[no-untyped-def]
    rows = compare(tensors, spec, tokenizer.size, Run())
    kinds = slots.kinds("fairway.artifact.coder")
    groups = {row.group for row in rows} - {"scales", "float16", "total"}
    assert {(row.group, row.coder) for row in rows} == {
        *((group, kind) for group in [*groups, "total"] for kind in kinds),
        *((name, coder) for name in ("scales", "float16") for coder in (PLAIN, NEAR)),
    }
    assert json.loads(json.dumps([row.plain() for row in rows]))[0]["group"] == rows[0].group
    for kind in kinds:
        packing = PackSpec(slots.technique("fairway.artifact.coder", kind).Spec())
        sealed = seal(tmp_path / "a.fw", tensors, spec, tokenizer.size, tokenizer, {}, packing)
        written = sum(size for name, size in sealed.sections.items() if name not in ("header", "tokenizer", "checksum"))
        (total,) = (row for row in rows if row.group == "total" and row.coder == kind)
        assert total.bytes == written
        assert total.codes == sum(v.codes.size if isinstance(v, Quantized) else v.size for v in tensors.values()) + sum(
            len(v.scales) for v in tensors.values() if isinstance(v, Quantized)
        )


def test_a_coder_that_loses_a_code_is_found_out(monkeypatch, tensors: Tensors, spec, tokenizer) -> None:  # type: ignore[no-untyped-def]
    real = plain.decode
    monkeypatch.setattr(plain, "decode", lambda blob, layout: tuple(np.maximum(c, -1) for c in real(blob, layout)))
    with pytest.raises(ContractError, match=r"coder 'plain' on .*: other codes came back"):
        compare(tensors, spec, tokenizer.size, Run(), [plain.Spec()])


def test_two_specs_of_one_coder_have_a_total_each(tensors: Tensors, spec, tokenizer) -> None:  # type: ignore[no-untyped-def]
    rows = compare(
        tensors, spec, tokenizer.size, Run(), [brotli.Spec(quality=1), brotli.Spec(reorder=True), rans.Spec()]
    )
    totals = {row.coder: row for row in rows if row.group == "total"}
    assert list(totals) == ["brotli", "brotli, rows reordered", "rans"]
    assert totals["brotli, rows reordered"].bytes < totals["brotli"].bytes
    assert totals["rans"].model_bytes is not None
    assert totals["brotli"].model_bytes is None


def test_a_chain_of_rows_goes_to_the_nearest_left() -> None:
    codes = np.array([[0, 0], [9, 9], [1, 0], [8, 9], [2, 1]], dtype=np.int8)
    assert chain(codes).tolist() == [0, 2, 4, 3, 1]
    chance = np.random.default_rng(0)
    many = chance.integers(-7, 8, (60, 9)).astype(np.int8)
    found = chain(many)
    assert sorted(found.tolist()) == list(range(60))
    for place in range(1, 60):  # brute force
        distances = [int(np.abs(many[found[place - 1]].astype(int) - many[row]).sum()) for row in found[place:]]
        assert distances[0] == min(distances)


def reorderable():  # type: ignore[no-untyped-def]
    from tests.artifact.test_coders import group

    some, chance = group(5, [(400, 40), (20, 40)]), np.random.default_rng(0)
    kinds, noise = chance.integers(-15, 16, (8, 40)), chance.integers(-15, 16, (400, 40))
    codes = np.where(chance.random((400, 40)) < 0.3, noise, kinds[chance.integers(0, 8, 400)])
    some.codes[0][:] = codes  # eight kinds of rows in any order: by columns, sorted, they are runs
    return some


def test_reordered_rows_come_back_and_a_false_permutation_is_refused() -> None:
    some = reorderable()
    blob = brotli.encode(some, brotli.Spec(reorder=True))
    assert blob[0] >= 2
    assert len(blob) < len(brotli.encode(some, brotli.Spec()))
    assert all(np.array_equal(a, b) for a, b in zip(brotli.decode(blob, some.layout), some.codes, strict=True))
    end = 5 + int.from_bytes(blob[1:5], "little")
    for rows, words in (([0] * 420, "no permutation"), ([*range(63)], "does not fit"), ([*range(421)], "announces")):
        places = squeeze(np.array(rows, "<u2").tobytes(), pairs=True)
        forged = blob[:1] + len(places).to_bytes(4, "little") + places + blob[end:]
        with pytest.raises(ValueError, match=words):
            brotli.decode(forged, some.layout)
    with pytest.raises(ValueError, match="cut short in the order"):
        brotli.decode(blob[:20], some.layout)


def test_context_is_the_smallest_and_rans_the_next(tensors: Tensors) -> None:
    """On a Gaussian group large enough for a model to pay: 60,000 codes with sizes by rows and columns."""
    from tests.artifact.test_entropy import group

    some = group([(300, 200)], 4.0)
    sizes = {m.__name__.rsplit(".", 1)[-1]: len(m.encode(some, m.Spec())) for m in (brotli, rans, context)}
    assert sizes["rans"] < 0.985 * sizes["brotli"]
    assert sizes["context"] < 1.005 * sizes["rans"]
