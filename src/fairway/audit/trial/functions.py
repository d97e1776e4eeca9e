"""Functions of Python and of libraries that a trial has its own of. Each takes (machine, args, kwargs, line)."""

from __future__ import annotations

import bisect
import collections
import functools
import heapq
import math
import random

from fairway.audit.trial import files, operator_module
from fairway.audit.trial.acting import Act, numeric, plain
from fairway.audit.trial.arguments import Parser, environ, group
from fairway.audit.trial.arrays import scalar
from fairway.audit.trial.builtin import BUILTIN, printed
from fairway.audit.trial.calls import Decorator
from fairway.audit.trial.core import Core
from fairway.audit.trial.drawing import Draws
from fairway.audit.trial.files import text_of
from fairway.audit.trial.holding import (
    accumulated,
    chained,
    copied,
    counter,
    dataclass_field,
    dataclass_fields,
    dataclass_kind,
    deepcopy,
    environment,
    grouped,
    held,
    in_batches,
    is_dataclass,
    iterated,
    made_dict,
    named_tuple,
    partial,
    picked_by,
    reduced_by,
    spelt,
    starred,
    type_hints,
)
from fairway.audit.trial.loading import loader, sampler, side_by_side
from fairway.audit.trial.losses import (
    applied,
    compiled,
    cross_entropy,
    embedded,
    first_of,
    functional,
    gather_losses,
    gather_objects,
    learned_from,
    mlx_cross_entropy,
)
from fairway.audit.trial.making import Device, Dtype, arange, full, full_like, like, made, tensor, wrapping
from fairway.audit.trial.of_numpy import NUMPY
from fairway.audit.trial.operators import combine
from fairway.audit.trial.reading import (
    frombuffer,
    fromfile,
    joined_path,
    memmap,
    packed,
    path_of,
    paths,
    tensor_from,
    unpacked,
)
from fairway.audit.trial.reducing import by_numpy, numpy_nonzero
from fairway.audit.trial.shapes import cat
from fairway.audit.trial.threads import Capture, Event, Executor, Graph, Queue, Stack, Store, Suppress, Thread
from fairway.audit.trial.values import UNKNOWN, Bound, Class, Func, Obj, Raised, Value
from fairway.audit.trial.vocabulary import Processor

# -- Python's own -----------------------------------------------------------------------------------------------------


# -- the world --------------------------------------------------------------------------------------------------------


def _clock(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return machine.read_clock()


# -- losses -----------------------------------------------------------------------------------------------------------


def _from_items(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """numpy.fromiter(items, dtype, count)"""
    dtype = kwargs.get("dtype", args[1] if len(args) > 1 else None)
    return tensor(list(machine.items(args[0])), dtype) if args else UNKNOWN


_WORLD: dict[str, Act] = {
    "numpy.fromiter": _from_items,
    "os.environ.get": environ,
    "os.getenv": environ,
    "os.environ.setdefault": environ,
    "os.environ.copy": environment,
    "os.environ.items": lambda machine, args, kwargs, line: list(environment(machine, args, kwargs, line).items()),
    **dict.fromkeys(["os.replace", "os.rename", "shutil.move", "shutil.copyfile", "shutil.copy"], plain(files.moved)),
    **dict.fromkeys(["numpy.savez", "numpy.savez_compressed"], plain(files.saved)),
    "numpy.load": plain(files.loaded),
    "tempfile.mkdtemp": lambda machine, args, kwargs, line: files.Scratch.name,
    "tempfile.gettempdir": lambda machine, args, kwargs, line: files.Scratch.name,
    "tempfile.TemporaryDirectory": lambda machine, args, kwargs, line: files.Scratch(),
    "os.path.join": plain(joined_path),
    "os.path.exists": lambda machine, args, kwargs, line: True,
    "os.path.isfile": lambda machine, args, kwargs, line: True,
    "os.path.isdir": lambda machine, args, kwargs, line: True,
    "os.path.basename": plain(lambda path: path.rpartition("/")[2] if isinstance(path, str) else UNKNOWN),
    "os.path.getsize": plain(lambda path: files.Stat(text_of(path) or "").st_size),
    "pathlib.Path": plain(path_of),
    "glob.glob": paths,
    "glob.iglob": paths,
    "numpy.fromfile": lambda machine, args, kwargs, line: fromfile(machine, *args, **kwargs),
    "torch.from_file": lambda machine, args, kwargs, line: tensor_from(machine, *args, **kwargs),
    **dict.fromkeys(
        ["numpy.frombuffer", "torch.frombuffer"],
        lambda machine, args, kwargs, line: frombuffer(machine, *args, **kwargs),
    ),
    **dict.fromkeys(
        ["struct.unpack", "struct.unpack_from"], lambda machine, args, kwargs, line: unpacked(machine, *args)
    ),
    "os.listdir": lambda machine, args, kwargs, line: list(files.NAMES),
    "numpy.memmap": lambda machine, args, kwargs, line: memmap(machine, *args, **kwargs),
    **dict.fromkeys(["time.time", "time.perf_counter", "time.monotonic", "time.process_time"], _clock),
    "copy.deepcopy": plain(deepcopy),
    "copy.copy": plain(copied),
    "dataclasses.replace": plain(copied),
    "collections.deque": held(collections.deque),
    "collections.OrderedDict": made_dict,
    "collections.Counter": counter,
    "collections.defaultdict": lambda machine, args, kwargs, line: collections.defaultdict(
        functools.partial(machine.call, args[0], (), {}, line) if args and args[0] is not None else None, *args[1:]
    ),
    "collections.namedtuple": named_tuple,
    "types.SimpleNamespace": lambda machine, args, kwargs, line: Obj(Class("Namespace", [], {}), dict(kwargs)),
    "argparse.Namespace": lambda machine, args, kwargs, line: Obj(Class("Namespace", [], {}), dict(kwargs)),
    "argparse.ArgumentParser": lambda machine, args, kwargs, line: Parser(machine, kwargs.get("parents", ())),
    "dataclasses.field": dataclass_field,
    "dataclasses.fields": dataclass_fields,
    "dataclasses.is_dataclass": plain(is_dataclass),
    "typing.get_type_hints": type_hints,
    "typing.cast": plain(lambda kind, value: value),
    "dataclasses.dataclass": dataclass_kind,
    "functools.partial": partial,
    "functools.reduce": reduced_by,
    **dict.fromkeys(
        [
            "functools.wraps",
            "functools.lru_cache",
            "functools.cache",
            "torch.no_grad",
            "torch.compile",
            "torch.inference_mode",
            "torch.jit.script",
            "torch.compiler.disable",
            "torch.enable_grad",
            "functools.update_wrapper",
        ],
        lambda machine, args, kwargs, line: (
            args[0]
            if args and isinstance(args[0], (Obj, Bound))
            else Decorator(lambda value: value)
            if not args or not isinstance(args[0], Func)
            else (Decorator(lambda value: value) if kwargs or len(args) > 1 else args[0])
        ),
    ),
    "functools.wraps": lambda machine, args, kwargs, line: Decorator(lambda value: value),
    "itertools.chain.from_iterable": chained,
    "itertools.accumulate": accumulated,
    **{
        f"itertools.{name}": iterated(name)
        for name in (
            "chain",
            "islice",
            "count",
            "repeat",
            "product",
            "zip_longest",
            "cycle",
            "pairwise",
            "tee",
        )
    },
    **{f"torch.utils.data.{each}DataLoader": loader for each in ("", "dataloader.")},
    "torch.utils.data.TensorDataset": side_by_side,
    **{f"torch.utils.data.{each}Sampler": sampler(shared=False) for each in ("Sequential", "Random")},
    "torch.utils.data.distributed.DistributedSampler": sampler(shared=True),
    "torch.utils.data.DistributedSampler": sampler(shared=True),
    "itertools.batched": in_batches,
    "itertools.starmap": starred,
    **{f"itertools.{name}": picked_by(name) for name in ("takewhile", "dropwhile", "filterfalse")},
    **{f"heapq.{name}": plain(getattr(heapq, name)) for name in ("heappush", "heappop", "heapify")},
    **{f"bisect.{name}": plain(getattr(bisect, name)) for name in ("bisect_left", "bisect_right", "bisect", "insort")},
    **{
        f"math.{name}": numeric(getattr(math, name))
        for name in (
            "log",
            "log2",
            "log10",
            "exp",
            "sqrt",
            "ceil",
            "floor",
            "cos",
            "sin",
            "isnan",
            "isfinite",
            "gcd",
            "isclose",
            "tanh",
            "isinf",
            "log1p",
            "expm1",
            "trunc",
        )
    },
    **dict.fromkeys([f"numpy.random.{each}" for each in ("default_rng", "Generator", "RandomState")], plain(Draws)),
    **dict.fromkeys(
        ["numpy.random.permutation", "torch.randperm"],
        plain(lambda *args, **kwargs: Draws().permutation(*args, **kwargs)),
    ),
    "numpy.random.shuffle": plain(lambda things: Draws().shuffle(things)),
    "random.Random": lambda machine, args, kwargs, line: random.Random(scalar(args[0]) if args else 0),
    **{
        f"random.{name}": plain(getattr(random.Random(5), name))
        for name in ("shuffle", "sample", "choice", "randint", "random", "randrange")
    },
    "json.dump": printed,
    "json.loads": lambda machine, args, kwargs, line: spelt(args[0]) if args else UNKNOWN,
    **{f"logging.{level}": printed for level in ("debug", "info", "warning", "error", "critical")},
    "json.dumps": lambda machine, args, kwargs, line: printed(machine, args, kwargs, line) or UNKNOWN,
    "torch.cuda.Event": lambda machine, args, kwargs, line: Event(machine),
    "torch.cuda.CUDAGraph": lambda machine, args, kwargs, line: Graph(),
    "torch.cuda.graph": lambda machine, args, kwargs, line: Capture(args[0] if args else kwargs.get("cuda_graph")),
    "contextlib.suppress": lambda machine, args, kwargs, line: Suppress(),
    "itertools.groupby": grouped,
    "contextlib.ExitStack": lambda machine, args, kwargs, line: Stack(machine),
    "contextlib.nullcontext": lambda machine, args, kwargs, line: args[0] if args else UNKNOWN,
    "concurrent.futures.ThreadPoolExecutor": lambda machine, args, kwargs, line: Executor(machine),
    "threading.Thread": lambda machine, args, kwargs, line: Thread(machine, kwargs),
    **{
        f"queue.{name}": lambda machine, args, kwargs, line: Queue(machine)
        for name in ("Queue", "SimpleQueue", "LifoQueue")
    },
    "multiprocessing.pool.ThreadPool": lambda machine, args, kwargs, line: Executor(machine),
    "sentencepiece.SentencePieceProcessor": lambda machine, args, kwargs, line: Processor(
        machine.vocabulary, machine.piece_asked
    ),
    "int.from_bytes": plain(int.from_bytes),
    "struct.pack": plain(packed),
    **dict.fromkeys(["uuid.uuid1", "uuid.uuid4"], lambda machine, args, kwargs, line: Unique("7" * 32)),
    **dict.fromkeys(["os.getpid", "os.getppid"], lambda machine, args, kwargs, line: 7),
    "sys.exit": lambda machine, args, kwargs, line: _leave(*args),
    # of arrays
    **dict.fromkeys(
        ["torch.nn.functional.cross_entropy", "torch.nn.functional.nll_loss", "torch.nn.functional.kl_div"],
        cross_entropy,
    ),
    "torch.nn.CrossEntropyLoss": lambda machine, args, kwargs, line: (
        lambda *given, **named: cross_entropy(machine, given, {**kwargs, **named}, line)
    ),
    "mlx.nn.losses.cross_entropy": mlx_cross_entropy,
    "torch.autograd.grad": learned_from,
    "torch.autograd.Function.apply": applied,
    "torch.nn.functional.embedding": lambda machine, args, kwargs, line: embedded(machine, *args, **kwargs),
    "torch.func.functional_call": lambda machine, args, kwargs, line: functional(machine, *args, **kwargs),
    **dict.fromkeys(
        [
            "torch.nn.parallel.DistributedDataParallel",
            "torch.nn.DataParallel",
            "mlx.core.compile",
        ],
        first_of,
    ),
    **dict.fromkeys(["torch.compile", "torch.jit.script", "torch.compiler.disable"], compiled),
    "torch.cuda.is_available": lambda machine, args, kwargs, line: True,
    "torch.distributed.is_available": lambda machine, args, kwargs, line: True,
    "torch.distributed.is_initialized": lambda machine, args, kwargs, line: True,
    **{
        f"torch.distributed.{name}": lambda machine, args, kwargs, line: Store()
        for name in ("TCPStore", "FileStore", "HashStore", "distributed_c10d._get_default_store")
    },
    "torch.distributed.PrefixStore": lambda machine, args, kwargs, line: args[1] if len(args) > 1 else Store(),
    "torch.distributed.get_rank": lambda machine, args, kwargs, line: group.get()[0],
    "torch.distributed.get_world_size": lambda machine, args, kwargs, line: group.get()[1],
    "torch.distributed.all_gather_object": plain(gather_objects),
    "torch.distributed.all_gather": plain(gather_objects),
    "torch.distributed.gather_object": lambda machine, args, kwargs, line: (
        gather_objects(args[1], args[0]) if len(args) > 1 else None
    ),
    "torch.distributed.all_gather_into_tensor": lambda machine, args, kwargs, line: machine.of_array("copy_", args, {}),
    "math.isqrt": numeric(math.isqrt),
    "math.hypot": numeric(math.hypot),
    "math.prod": lambda machine, args, kwargs, line: functools.reduce(
        functools.partial(combine, "Mult"), machine.items(args[0]), kwargs.get("start", 1)
    ),
    "numpy.nonzero": plain(numpy_nonzero),
    "numpy.sort": plain(by_numpy("sort")),
    "numpy.append": plain(lambda array, more, axis=0: cat([array, more], axis)),
    **dict.fromkeys(["*.gather", "*.take_along_dim", "*.take_along_axis"], gather_losses),
    "*.zeros": plain(made(0)),
    "*.empty": plain(made(0)),
    "*.ones": plain(made(1)),
    "*.full": plain(full),
    "*.zeros_like": plain(like(0)),
    "*.empty_like": plain(like(0)),
    "*.ones_like": plain(like(1)),
    "*.full_like": plain(full_like),
    "*.dtype": plain(Dtype),
    "torch.device": plain(Device),
    "*.arange": plain(arange),
    **dict.fromkeys(["*.tensor", "*.as_tensor", "*.from_numpy", "*.array", "*.asarray"], plain(tensor)),
    **{
        f"*.{name}": numeric(kind)
        for name, kind in (
            *dict.fromkeys(("int64", "int32", "int16", "uint8", "uint16", "uint32"), int).items(),
            ("float64", float),
            ("float32", float),
        )
    },
    "*.uint64": plain(wrapping),
}


class Unique(str):
    """What tells one run from another, in the names of its files: a text of which one is as good as another."""

    @property
    def hex(self) -> str:
        return str(self)


def _leave(said: Value = None) -> Value:
    raise Raised("SystemExit", said)


def functions() -> dict[str, Act]:
    """Path -> function; `*.name` for one that several array libraries have."""
    return {**BUILTIN, **_WORLD, **NUMPY, **operator_module.FUNCTIONS}
