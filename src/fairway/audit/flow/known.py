"""Operations that are known by their names, whichever library has them."""

import re

LOSSES = re.compile(
    r"cross_?entropy|(^|_)nll|(^|_)ce(_|$)|ce_loss|lm_loss|token_loss|fused_ce|xent|log_?likelihood|log_?prob$",
    re.I,
)
PICKS = frozenset(("gather", "take_along_dim", "take_along_axis", "index_select", "take", "gather_nd", "pick"))
LEAST = frozenset(
    ("min", "amin", "argmin", "minimum", "fmin", "nanmin", "nanargmin", "topk", "sort", "argsort", "kthvalue",
     "lexsort", "sorted", "cummin",
     "max", "amax", "argmax", "maximum", "fmax", "nanmax", "nanargmax", "nsmallest", "nlargest", "aminmax")
)  # fmt: skip
MADE = frozenset(
    ("zeros", "ones", "empty", "full", "rand", "randn", "tensor", "zeros_like", "ones_like", "empty_like", "full_like",
     "rand_like", "randn_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "array", "eye",
     "empty_strided", "bytearray", "HalfTensor", "FloatTensor", "LongTensor")
)  # fmt: skip
LIKE = frozenset(("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"))
VIEWS = frozenset(
    ("view", "reshape", "squeeze", "unsqueeze", "permute", "transpose", "t", "detach", "expand", "expand_as", "flatten",
     "narrow", "view_as", "contiguous", "swapaxes", "movedim", "unflatten", "ravel", "as_tensor", "from_numpy",
     "asarray", "ascontiguousarray", "numpy", "memoryview", "requires_grad_", "share_memory_", "pin_memory",
     "retain_grad",
     "unfold")
)  # fmt: skip
CASTS = frozenset(
    (
        "to",
        "float",
        "half",
        "bfloat16",
        "double",
        "long",
        "int",
        "cuda",
        "cpu",
        "type",
        "astype",
        "bool",
        "short",
        "byte",
    )
)
COPIES = frozenset(("clone", "copy", "deepcopy", "new_tensor"))
SIZES = frozenset(
    (
        "len",
        "size",
        "numel",
        "dim",
        "nelement",
        "element_size",
        "stat",
        "getsize",
        "count_nonzero",
        "perf",
        "ndimension",
    )
)
PLACES = frozenset(("nonzero", "flatnonzero", "argwhere", "searchsorted", "bucketize", "where", "cumsum_lengths"))
RESETS = frozenset(
    ("zero_", "fill_", "uniform_", "normal_", "random_", "exponential_", "trunc_normal_", "kaiming_uniform_", "eye_",
     "xavier_uniform_", "kaiming_normal_", "orthogonal_", "zeros_", "ones_", "constant_", "xavier_normal_",
     "bernoulli_",
     "dirac_", "sparse_", "geometric_", "log_normal_", "cauchy_")
)  # fmt: skip
COUNTED = frozenset(("bincount", "Counter", "unique", "unique_consecutive", "histc", "histogram", "value_counts"))
KEYED = frozenset(("index_add_", "scatter_add_", "index_put_", "index_fill_", "put_", "index_copy_", "scatter_reduce_"))
CLOCKS = frozenset(("time", "perf_counter", "monotonic", "process_time", "perf_counter_ns", "time_ns", "elapsed_time"))
PAIRS = frozenset(("min", "max", "minimum", "maximum"))
MAKES_ROW = frozenset(("unsqueeze", "expand_dims"))
MODULE_NAMES = frozenset(
    ("add_module", "apply", "bfloat16", "bias", "buffers", "children", "compile", "cpu", "cuda", "data", "device",
     "double", "dtype", "eval", "extra_repr", "flat", "float", "forward", "get_buffer", "get_extra_state",
     "get_parameter", "get_submodule", "grad", "H", "half", "ipu", "load_state_dict", "mH", "mT", "module",
     "modules", "mtia", "named_buffers", "named_children", "named_modules", "named_parameters", "parameters", "real",
     "register_backward_hook", "register_buffer", "register_forward_hook", "register_forward_pre_hook",
     "register_full_backward_hook", "register_full_backward_pre_hook", "register_load_state_dict_post_hook",
     "register_load_state_dict_pre_hook", "register_module", "register_parameter", "register_state_dict_post_hook",
     "register_state_dict_pre_hook", "requires_grad", "requires_grad_", "set_extra_state", "set_submodule",
     "share_memory", "state_dict", "T", "to", "to_empty", "train", "training", "type", "values", "weight", "xpu",
     "zero_grad", "_buffers", "_forward_module", "_modules", "_orig_mod", "_parameters")
)  # fmt: skip
"""What torch.nn.Module has (torch 2.13), and what wrappers and tensors of one are asked for: none of it is set."""
