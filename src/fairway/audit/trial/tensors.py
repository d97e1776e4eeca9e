"""What arrays can do: the functions and methods of torch, numpy and their kin that scripts count tokens with."""

from __future__ import annotations

from collections.abc import Callable

from fairway.audit.trial.arrays import Array, limited, scalar, taken
from fairway.audit.trial.core import Core
from fairway.audit.trial.given import body_of, kept, numbers_of
from fairway.audit.trial.ids import ids_of
from fairway.audit.trial.least import least, several_sums
from fairway.audit.trial.making import cast, copied, dtype_of, full, made, same, tensor, typed
from fairway.audit.trial.reducing import (
    bincount,
    by_numpy,
    clamp,
    clamp_max,
    copy_,
    divided,
    elementwise,
    equal,
    fill_,
    in_place,
    masked_fill,
    nonzero,
    operated,
    ordered,
    pairwise,
    reduction,
    rounded,
    running,
    unique_consecutive,
    where,
    zero_,
)
from fairway.audit.trial.scattering import bucketize, index_add_, index_put_, scatter_add_, scatter_reduce
from fairway.audit.trial.shapes import (
    cat,
    chunk,
    expand,
    expand_as,
    flatten,
    flip,
    gather,
    index_select,
    masked_select,
    moved,
    narrow,
    pad,
    picked,
    repeat,
    repeat_interleave,
    reshape,
    roll,
    select,
    sliding_window_view,
    split,
    squeeze,
    stack,
    swapped,
    transposed,
    turned,
    unbind,
    unflatten,
    unfold,
    unsqueeze,
)
from fairway.audit.trial.values import UNKNOWN, Lib, Obj, Value, mixed


class Size(int):
    """numpy's x.size and torch's x.size(dim)."""

    shape: tuple[int, ...]

    def __call__(self, dim: Value = None) -> Value:
        return self.shape if dim is None else self.shape[scalar(dim)]


def array_attribute(machine: Core, array: Array, name: str) -> Value:
    """array.name."""
    if name == "shape":
        return array.shape
    if name == "size":
        size = Size(array.body.size)
        size.shape = array.shape
        return size
    if name == "ndim":
        return array.body.ndim
    if name in ("T", "mT"):
        return array.all(lambda body: body.T)
    if name in ("data", "real", "at", "values"):  # the last of x.max(-1)
        return array
    if name == "itemsize":
        return array.num.dtype.itemsize if array.num is not None else 4
    if name == "nbytes":
        return array.num.nbytes if array.num is not None else UNKNOWN
    if name == "is_cuda":
        return True
    if name == "dtype":
        return Lib(f"torch.{array.num.dtype.name}") if array.num is not None and array.num.dtype != object else UNKNOWN
    if name in ("device", "grad", "requires_grad", "flags", "layout", "is_leaf"):
        return UNKNOWN
    if name == "backward":
        return lambda *args, **kwargs: machine.learn(array)
    if name == "requires_grad_" and array.num is not None and not array.num.any():
        machine.rows_made = array.shape[0] if array.body.ndim else 0
        machine.leaf()
    return lambda *args, **kwargs: machine.of_array(name, (array, *args), kwargs)


class Arrays(Core):
    """A part of the machine."""

    def of_array(self, name: str, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        """torch.name(array, ...), array.name(...): unknown where the trial has no such function."""
        act = METHODS.get(name)
        if act is None:
            return mixed(*args) if name in _LOSING else kept(args)
        if args and isinstance(args[0], Obj) and name in _JOINING:  # torch.stack(sums) of a named tuple
            args = (tuple(self.items(args[0])), *args[1:])
        if name in ("min", "amin") and len(args) == 1 and not kwargs and isinstance(args[0], Array):
            sums = several_sums(args[0])  # sums.min() of those that were kept side by side
            if sums:
                return least(self, [sums[0]], sums, self.line)
        if isinstance(kwargs.get("out"), Array):
            return copy_(kwargs["out"], self.of_array(name, args, {**kwargs, "out": None}))
        try:
            found = self.booked(act(*args, **kwargs))
            if isinstance(found, Array) and name not in _PLACING:
                self.weigh(found)
            return found
        except (ArithmeticError, TypeError, ValueError, LookupError, AttributeError, AssertionError):
            return mixed(*args)


_JOINING = {"stack", "cat", "concat", "concatenate", "vstack", "hstack"}
_PLACING = {"index_add_", "index_put_", "scatter_add_", "view"}
"""What takes the time of what it puts into an array, and not of all of it: tables of hashed counts are large."""
_LOSING = {"argmax", "argmin", "argsort", "sort", "topk", "eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan"}


def tolist(array: Value, *_: Value) -> Value:
    """Numbers, Sums or ids as lists."""
    held = body_of(array)
    limited(held.body.size * 10)
    if held.lossy or (held.num is not None and held.num.dtype == object):
        if held.body.ndim == 0:
            return scalar(held)
        return [tolist(taken(held, n)) for n in range(len(held.body))]
    assert held.num is not None
    if held.pos is not None and held.num.dtype.kind in "iu" and bool((held.pos >= 0).any()):
        return ids_of(held.num, held.pos)
    return held.num.tolist()


def item(array: Value, *_: Value) -> Value:
    return scalar(array)


def numel(array: Value) -> Value:
    return int(body_of(array).body.size)


def dimensions(array: Value) -> Value:
    return body_of(array).body.ndim


_BYTES = 1 << 20


def tobytes(array: Value) -> Value:
    """Of whole numbers; of a size that a trial holds."""
    num = body_of(array).num
    known = num is not None and num.dtype.kind in "iu" and num.nbytes <= _BYTES
    return num.tobytes() if known and num is not None else UNKNOWN


def view(array: Value, *shape: Value, **named: Value) -> Value:
    """In another shape; of whole numbers, as others of the same size: uint16 travels as int16."""
    dtype = dtype_of(shape[0]) if len(shape) == 1 else dtype_of(named.get("dtype"))
    if dtype is None:
        return reshape(array, *shape)
    held = body_of(array).num
    same = held is not None and {held.dtype.kind, dtype.kind} <= set("iu") and held.dtype.itemsize == dtype.itemsize
    return cast(array, Lib(f"numpy.{dtype.name}")) if same else mixed(array)


METHODS: dict[str, Callable[..., Value]] = {
    "reshape": reshape,
    "view": view,
    "expand_as": expand_as,
    **dict.fromkeys(["view_as", "reshape_as"], lambda array, other: reshape(array, body_of(other).shape)),
    "unflatten": unflatten,
    "flatten": flatten,
    "ravel": flatten,
    **dict.fromkeys(["permute", "t"], transposed),
    "transpose": turned,
    **dict.fromkeys(["swapaxes", "swapdims"], swapped),
    "squeeze": squeeze,
    **dict.fromkeys(["unsqueeze", "expand_dims"], unsqueeze),
    **dict.fromkeys(["expand"], expand),
    **dict.fromkeys(["broadcast_to"], expand),
    **dict.fromkeys(["cuda", "cpu", "contiguous", "detach", "pin_memory", "requires_grad_", "numpy", "eval"], same),
    **dict.fromkeys(["ascontiguousarray", "record_stream", "stop_gradient", "item_"], same),
    **dict.fromkeys(["clone", "copy"], copied),
    **dict.fromkeys(["to", "astype", "type", "view_dtype"], cast),
    **{
        name: typed(name)
        for name in ("long", "int", "short", "bool", "float", "double", "half", "bfloat16", "int64", "int32")
    },
    **{
        name: reduction(name)
        for name in (
            "sum",
            "mean",
            "nansum",
            "nanmean",
            "max",
            "min",
            "amax",
            "amin",
            "any",
            "all",
            "prod",
            "median",
            "std",
            "var",
        )
    },
    **{
        name: elementwise(name)
        for name in (
            "exp",
            "log",
            "log2",
            "log1p",
            "abs",
            "sqrt",
            "floor",
            "ceil",
            "square",
            "negative",
            "logical_not",
            "isnan",
            "isfinite",
            "expm1",
            "sin",
            "cos",
            "tanh",
            "sign",
            "trunc",
            "exp2",
            "log10",
            "nan_to_num",
            "invert",
            "reciprocal",
        )
    },
    "neg": elementwise("negative"),
    "round": rounded,
    "fmod": pairwise("fmod"),
    "unique_consecutive": unique_consecutive,
    **{
        name: pairwise(name) for name in ("minimum", "maximum", "logaddexp", "logical_and", "logical_or", "logical_xor")
    },
    "fmin": pairwise("minimum"),
    "fmax": pairwise("maximum"),
    "bitwise_not": elementwise("invert"),
    "rsqrt": lambda array: elementwise("reciprocal")(elementwise("sqrt")(array)),
    "sort": ordered,
    "cummax": running("maximum"),
    "cummin": running("minimum"),
    "type_as": lambda array, other: cast(array, Lib(f"x.{numbers_of(other).dtype.name}")),
    **{
        name: operated(kind)
        for name, kind in (
            ("add", "Add"),
            ("sub", "Sub"),
            ("subtract", "Sub"),
            ("mul", "Mult"),
            ("multiply", "Mult"),
            ("true_divide", "Div"),
            ("floor_divide", "FloorDiv"),
            ("remainder", "Mod"),
            ("eq", "Eq"),
            ("ne", "NotEq"),
            ("lt", "Lt"),
            ("le", "LtE"),
            ("gt", "Gt"),
            ("ge", "GtE"),
            ("equal_to", "Eq"),
            ("bitwise_and", "BitAnd"),
            ("bitwise_xor", "BitXor"),
            ("bitwise_or", "BitOr"),
            ("pow", "Pow"),
            ("power", "Pow"),
            ("mod", "Mod"),
            ("left_shift", "LShift"),
            ("right_shift", "RShift"),
        )
    },
    **dict.fromkeys(["div", "divide"], divided),
    **{name: in_place(kind) for name, kind in (("add_", "Add"), ("sub_", "Sub"), ("mul_", "Mult"), ("div_", "Div"))},
    **dict.fromkeys(["clamp", "clip", "clamp_min", "clamp_min_", "clamp_"], clamp),
    **dict.fromkeys(["clamp_max", "clamp_max_"], clamp_max),
    "where": where,
    "masked_fill": masked_fill,
    "masked_fill_": lambda array, mask, value: copy_(array, masked_fill(array, mask, value)),
    "masked_select": masked_select,
    "index_select": index_select,
    **dict.fromkeys(["gather", "take_along_dim", "take_along_axis"], gather),
    "take": picked,
    "narrow": narrow,
    "unfold": unfold,
    "sliding_window_view": sliding_window_view,
    "split": split,
    **dict.fromkeys(["chunk", "array_split", "tensor_split"], chunk),
    "unbind": unbind,
    "select": select,
    **dict.fromkeys(["movedim", "moveaxis"], moved),
    "index_add_": index_add_,
    "index_put_": index_put_,
    "scatter_add_": scatter_add_,
    "scatter_reduce": scatter_reduce,
    "scatter_reduce_": lambda array, *args, **kwargs: copy_(array, scatter_reduce(array, *args, **kwargs)),
    "bucketize": bucketize,
    "tolist": tolist,
    "tobytes": tobytes,
    **dict.fromkeys(["cat", "concatenate", "concat", "hstack"], cat),
    "stack": stack,
    "item": item,
    **dict.fromkeys(["numel", "nelement"], numel),
    "dim": dimensions,
    "copy_": copy_,
    "fill_": fill_,
    "zero_": zero_,
    "bincount": bincount,
    **{
        name: by_numpy(name)
        for name in (
            "cumsum",
            "cumprod",
            "searchsorted",
            "unique",
            "argsort",
            "lexsort",
            "diff",
            "flatnonzero",
            "isin",
            "setdiff1d",
            "intersect1d",
            "union1d",
            "linspace",
            "argmax",
            "argmin",
            "repeat_",
            "digitize",
            "outer",
            "count_nonzero",
            "tril",
            "triu",
        )
    },
    "new_tensor": lambda array, value, **kwargs: tensor(value),
    "new_zeros": lambda array, *shape, **kwargs: made(0)(
        *shape, **{"dtype": Lib(f"x.{numbers_of(array).dtype.name}"), **kwargs}
    ),
    "new_ones": lambda array, *shape, **kwargs: made(1)(
        *shape, **{"dtype": Lib(f"x.{numbers_of(array).dtype.name}"), **kwargs}
    ),
    "new_full": lambda array, shape, fill, **kwargs: full(shape, fill),
    "nonzero": nonzero,
    "roll": roll,
    **dict.fromkeys(["flip", "flipud"], flip),
    "repeat_interleave": repeat_interleave,
    **dict.fromkeys(["repeat", "tile"], repeat),
    "pad": pad,
    **dict.fromkeys(["equal", "array_equal", "allclose"], equal),
}


def _written_back(act: Callable[..., Value]) -> Callable[..., Value]:
    """`rows.pow_(2)`: what `rows.pow(2)` gives is written into the rows."""
    return lambda array, *args, **kwargs: copy_(array, act(array, *args, **kwargs))


METHODS.update(
    {
        f"{name}_": _written_back(METHODS[name])
        for name in """abs exp log log2 log10 sqrt rsqrt square pow neg negative reciprocal round floor ceil trunc tanh
        sigmoid expm1 log1p exp2 sin cos sign nan_to_num logical_not logical_and logical_or logical_xor bitwise_and
        bitwise_or bitwise_xor""".split()  # noqa: SIM905
        if name in METHODS and f"{name}_" not in METHODS
    }
)
