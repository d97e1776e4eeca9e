"""A model's losses at tokens, the ways to ask for them, and what learns from them."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fairway.audit.trial.arrays import Array, put, states_of, sum_of
from fairway.audit.trial.calls import Decorator, losses_mean
from fairway.audit.trial.core import Core
from fairway.audit.trial.values import NET, UNKNOWN, Bound, Func, Obj, Unknown, Value, mixed


def cross_entropy(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """F.cross_entropy, F.nll_loss: the loss of each target, or their mean or sum."""
    target = kwargs.get("target", kwargs.get("targets", args[1] if len(args) > 1 else None))
    if not isinstance(target, Array) or target.num is None:
        return NET
    losses = machine.losses(target)
    reduction = kwargs.get("reduction", "none" if kwargs.get("reduce") is False else "mean")
    if isinstance(reduction, Unknown):
        return NET
    if reduction == "none":
        return losses
    return machine.booked(sum_of(losses) if reduction == "sum" else losses_mean(losses))


def mlx_cross_entropy(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    return cross_entropy(machine, args, {"reduction": "none", **kwargs}, line)


def gather_losses(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """torch.gather(x, dim, index) of a model's numbers at tokens: losses. Else of known numbers."""
    index = next((each for each in (*args[1:], kwargs.get("index")) if isinstance(each, Array)), None)
    if isinstance(args[0], Unknown):
        return machine.losses(index) if args[0].net and index is not None and index.pos is not None else args[0]
    return machine.of_array("gather", args, kwargs)


def learned_from(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """torch.autograd.grad(loss, ...)."""
    machine.learn(args[0])
    return UNKNOWN


def applied(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """Function.apply(logits, targets, ...) of an autograd function that the script writes itself: of a model's numbers
    and of tokens it makes losses."""
    targets = [each for each in args if isinstance(each, Array) and each.pos is not None]
    nets = any(isinstance(each, Unknown) and each.net for each in args)
    return machine.losses(targets[0]) if nets and targets else mixed(*args)


def functional(
    machine: Core, module: Value, weights: Value, args: Value = (), kwargs: Value = None, **_: Value
) -> Value:
    """torch.func.functional_call(module, weights, args, kwargs): what the module makes of them; one that is no tuple is
    the only one."""
    given = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    named = kwargs if isinstance(kwargs, dict) else {}
    made = UNKNOWN if isinstance(module, Unknown) else machine.call(module, given, named, 0)
    return NET if isinstance(made, Unknown) else made


def embedded(machine: Core, ids: Value, weight: Value = UNKNOWN, *_: Value, **__: Value) -> Value:
    """F.embedding(ids, weight): of weights that nobody knows, what a model makes of tokens."""
    if isinstance(ids, Array) and isinstance(weight, Array):
        return machine.item(weight, ids)
    machine.embedded += 1
    if isinstance(ids, Array) and ids.pos is not None:
        return states_of([ids])
    return mixed(ids, weight)


def gather_objects(parts: Value, mine: Value, *_: Value, **__: Value) -> None:
    """dist.all_gather_object(parts, mine), of a world of one."""
    if isinstance(parts, list) and parts:
        if isinstance(parts[0], Array) and isinstance(mine, Array):
            put(parts[0], Ellipsis, mine)
        else:
            parts[0] = mine


def compiled(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """torch.compile(f): the function; of a model or a method of one what is known of models, which costs no steps,
    unless the method is given tokens twice: inputs and their targets. A method of what is no model is itself."""
    if not args:
        return Decorator(lambda value: value)
    if isinstance(args[0], Bound) and isinstance(args[0].me, Obj) and not args[0].me.kind.is_module:
        return args[0]
    if isinstance(args[0], Bound):
        return functools.partial(_with_targets, args[0])
    if isinstance(args[0], Obj) and args[0].kind.is_module:
        return Compiled(machine, args[0])
    return args[0] if isinstance(args[0], Func) else mixed(*args)


class Compiled:
    """torch.compile(model): the model's own, where that is given inputs and their targets, or asked for anything else;
    what is known of models, where it is given inputs alone."""

    def __init__(self, machine: Core, model: Obj) -> None:
        self.machine = machine
        self.model = model

    def __call__(self, *args: Value, **kwargs: Value) -> Value:
        return _with_targets(self._called, *args, **kwargs)

    def _called(self, *args: Value, **kwargs: Value) -> Value:
        return self.machine.call(self.model, args, kwargs, 0)

    def __getattr__(self, name: str) -> Value:
        return self.machine.attribute(self.model, name)


def _with_targets(method: Callable[..., Value], *args: Value, **kwargs: Value) -> Value:
    given = (*args, *kwargs.values())
    tokens = sum(isinstance(each, Array) and each.pos is not None for each in given)
    return method(*args, **kwargs) if tokens > 1 else states_of(given) if tokens else mixed(*given)


def first_of(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    """DistributedDataParallel(model): what it wraps."""
    return args[0] if args else Decorator(lambda value: value)
