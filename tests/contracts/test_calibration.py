"""The promise of the slot quant/calibration, run on every file in it: Hessians of all that is asked for, symmetric and
positive semidefinite, the same again, and the same by two ranks as by one.

A source offers `Spec`, `ON_CLOCK`, `observer(quant, model, names, run)` and
`hessians(quant, model, names, windows, run, seed)`.
"""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from fairway.base.errors import RecipeError
from fairway.base.journal import Run
from fairway.base.ranks import Ranks
from fairway.base.slots import kinds, technique
from fairway.base.specs import build, to_plain
from fairway.quant import QuantSpec, observed, read_hessians, write_hessians
from tests.quant.conftest import VOCAB, small_model

FOLDER = "fairway.quant.calibration"
TABLES = {
    "text": [{}],
    "generated": [{"sequences": 7, "tokens": 16}, {"sequences": 3, "tokens": 1, "temperature": 1.5}],
    "online": [{"every": 1}, {"every": 2, "decay": 0.5, "start_scale": 1.0}],
}
CASES = [(kind, table) for kind in kinds(FOLDER) for table in TABLES.get(kind, [{}])]
every_source = pytest.mark.parametrize(("kind", "table"), CASES, ids=lambda value: str(value))
STEPS = 4


def quant_of(kind, table):
    return build(QuantSpec, {"calibration": {"kind": kind, **table}, "calibration_batch": 3})


def batches():
    chance = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCAB, (4, 16), generator=chance) for _ in range(STEPS)]


def gathered(kind, table, folder, ranks=None, seed=0, model=None):
    """What a source gives of a model that saw the same batches while it was trained and after: its rank's part."""
    ranks, source, quant = ranks or Ranks(), technique(FOLDER, kind), quant_of(kind, table)
    model = small_model() if model is None else model
    names, mine = observed(model, quant), [batch[ranks.share(4)] for batch in batches()]
    with Run(folder, ranks) as run:
        observer = source.observer(quant, model, names, run)
        if observer is not None:
            for step, inputs in enumerate(mine, 1):
                observer.after_step(step, 0.5, inputs)
            observer.finish()
            ranks.wait()
        return source.hessians(quant, model, names, mine, run, seed)


@every_source
def test_hessians_are_square_symmetric_and_positive_semidefinite_of_every_matrix(kind, table, tmp_path):
    model, quant = small_model(), quant_of(kind, table)
    found = gathered(kind, table, tmp_path)
    assert sorted(found) == sorted(observed(model, quant))
    assert len(found) > 15
    for name, hessian in found.items():
        inputs = model.get_parameter(name).shape[1]
        assert (hessian.shape, hessian.dtype) == ((inputs, inputs), torch.float32)
        values = torch.linalg.eigvalsh(hessian.double())
        torch.testing.assert_close(hessian, hessian.T, rtol=1e-5, atol=1e-6)
        assert float(values.min()) > -1e-5 * float(values.max())
        assert float(values.max()) > 0


@every_source
def test_the_same_seed_gives_the_same_hessians(kind, table, tmp_path):
    first, again = (gathered(kind, table, tmp_path / name, seed=3) for name in ("a", "b"))
    assert all(torch.equal(first[name], again[name]) for name in first)


@every_source
def test_where_no_hessian_is_asked_for_nothing_is_read_written_or_booked(kind, table, tmp_path):
    def never():
        raise AssertionError("text was read")
        yield

    source, quant, model = technique(FOLDER, kind), quant_of(kind, table), small_model()
    with Run(tmp_path) as run:
        assert source.observer(quant, model, [], run) is None
        assert source.hessians(quant, model, [], never(), run, 0) == {}
        assert run.facts == {}
    assert not list(tmp_path.glob("*.safetensors"))


@every_source
def test_only_a_source_on_the_clock_reads_text_after_training(kind, table, tmp_path, monkeypatch):
    source, read = technique(FOLDER, kind), []

    def windows():
        read.append(kind)
        yield from batches()

    gathered(kind, table, tmp_path)
    quant, model = quant_of(kind, table), small_model()
    with Run(tmp_path) as run:
        source.hessians(quant, model, observed(model, quant), windows(), run, 0)
    assert bool(read) == source.ON_CLOCK


@every_source
def test_its_spec_survives_a_recipe(kind, table):
    quant = quant_of(kind, table)
    assert build(QuantSpec, to_plain(quant)) == quant


def _one_of_two(rank, folder):
    """A gloo process: what its source gave, of every case, written by the first."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    ranks = Ranks(rank, 2)
    for number, (kind, table) in enumerate(CASES):
        found = gathered(kind, table, folder / f"run{number}", ranks)
        ranks.wait()
        if ranks.first:
            write_hessians(folder / f"{number}.safetensors", found)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one_of_two, args=(rank, folder)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
    return folder


@pytest.mark.skipif(os.name == "nt", reason="gloo is tried on POSIX")
@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{kind}-{table}" for kind, table in CASES])
def test_two_gloo_ranks_give_the_hessians_of_one(by_two, tmp_path, number):
    """Half of every batch each; of `generated`, half of the sequences: not one rank's alone, not the same twice."""
    alone, both = gathered(*CASES[number], tmp_path), read_hessians(by_two / f"{number}.safetensors")
    assert sorted(both) == sorted(alone)
    for name, hessian in alone.items():
        torch.testing.assert_close(both[name], hessian, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"kind": "generate"}, "calibration = 'generate': no such technique (did you mean 'generated'?)"),
        ({"kind": "generated", "sequences": 0}, "calibration: sequences = 0: at least 1 is needed"),
        ({"kind": "generated", "tokens": 0}, "calibration: tokens = 0: at least 1 is needed"),
        ({"kind": "generated", "temperature": 0.0}, "calibration: temperature = 0.0: a positive number"),
        ({"kind": "online", "every": 0}, "calibration: every = 0: at least 1 step"),
        ({"kind": "online", "start_scale": 0.0}, "calibration: start_scale = 0.0: a number in (0, 1]"),
        ({"kind": "online", "start_scale": 1.2}, "calibration: start_scale = 1.2: a number in (0, 1]"),
        ({"kind": "online", "decay": float("nan")}, "calibration: decay = nan: a number in (0, 1]"),
    ],
)
def test_an_impossible_source_is_refused(table, says):
    with pytest.raises(RecipeError) as caught:
        build(QuantSpec, {"calibration": table})
    assert says in str(caught.value)
