"""torch, jax and the running of functions elsewhere: gradients of functions, threads, ranks, parameters."""

from __future__ import annotations

from typing import Any

from fairway.audit.flow.builtin import Builtins
from fairway.audit.flow.heap import Obj
from fairway.audit.flow.values import (
    CLOCK,
    GRAD,
    MISSING,
    NONE,
    NOTHING,
    RANKED,
    WEIGHTS,
    Value,
    join,
)


class Torches(Builtins):
    """What these libraries do with functions, gradients and ranks."""

    # Functional gradients.
    def _do_value_and_grad(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._gradient_of(args[0], True, kwargs, node) if args else None

    def _do_grad(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        called = args and any(obj.kind in ("function", "bound", "partial") for obj in args[0].refs)
        return self._gradient_of(args[0], False, kwargs, node) if called else None

    def _do_grad_and_value(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return self._gradient_of(args[0], "last", kwargs, node) if args else None

    def _gradient_of(self, function: Value, valued: bool | str, kwargs: dict[str, Value], node: Any) -> Value:
        place = kwargs.get("argnums", NOTHING).const
        return self.ref(self.new("gradient", (function, valued, place if isinstance(place, int) else 0), node))

    def differentiated(self, args: list[Value], place: int, node: Any) -> list[Value]:
        """The arguments of a function whose gradient is taken: what it is taken by are weights, whoever made them."""
        if not 0 <= place < len(args):
            return args
        return [*args[:place], self._as_weights(args[place], node), *args[place + 1 :]]

    def _as_weights(self, value: Value, node: Any, deep: int = 4) -> Value:
        if not value.refs:
            known = value.toks or value.states or value.losses or value.items is not None or value.flags & GRAD
            return value if known else self.grown(value, node)
        for obj in value.refs:
            if obj.kind == "tensor" and not self.learner(obj) and not self.content(obj).toks:
                self.grow(obj)
            for key, held in list(obj.slots.items()) if obj.kind in ("dict", "list") and deep else ():
                if isinstance(held, Value) and key != "#keys":
                    self._grow_within(obj, key, held, node, deep - 1)
        return value

    def _grow_within(self, obj: Obj, key: Any, held: Value, node: Any, deep: int) -> None:
        if held.items is not None and not held.refs:
            made = held.but(items=tuple(self._as_weights(item, node, deep) for item in held.items))
        else:
            made = self._as_weights(held, node, deep)
        if made is not held:
            self.heap.set(obj, key, made)

    def _do_apply_updates(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """optax.apply_updates(weights, steps): new weights that have learned"""
        if len(args) < 2:
            return None
        steps = self.flat(args[1])
        if args[0].refs:
            made = self.copied(args[0])
        else:
            tree = self.new("dict", "weights", node)
            tree.slots["#elem"] = self.flat(args[0]).but(const=MISSING)
            made = self.ref(tree)
        for obj in made.refs:
            old = self.flat(args[0]).knows
            obj.slots["#fresh"] = min((o.slots.get("#fresh", o.born) for o in args[0].refs), key=len, default=())
            self.learn(obj, steps.toks, "gradient", node, steps.losses)
            self.heap.set(obj, "#learned", obj.slots.get("#learned", 0) | old)
        return made

    def _do_tree_map(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        result = self.call(args[0], [self.flat(each) for each in args[1:]], {}, node)
        return self.flat(result)

    # Running functions elsewhere.
    def _do_Thread(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        thing = self.new("thing", name, node)
        target = kwargs.get("target", args[1] if len(args) > 1 else NOTHING)
        given = kwargs.get("args", NOTHING)
        thing.slots["#target"] = target
        thing.slots["#args"] = given
        return self.ref(thing)

    _do_Process = _do_Thread

    def _do_spawn(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if not args:
            return None
        given = kwargs.get("args", args[1] if len(args) > 1 else NOTHING)
        self.call(args[0], [Value(const=0), *(given.items or ())], {}, node)
        return NONE

    def _do_checkpoint(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        called = args and any(obj.kind in ("function", "bound", "instance", "partial") for obj in args[0].refs)
        return self.call(args[0], args[1:], {}, node) if called else None

    def _do_vmap(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        return args[0] if args else None

    def _do_backward(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        for each in args[:1]:
            for part in self.elements(each, node).exact or (each,):
                self.backward(part, node)
        return NONE

    def _do_graph(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """torch.cuda.graph(g), which a `with` fills"""
        if not name.endswith("cuda.graph") or not args:
            return None
        capture = self.new("thing", "capture", node)
        capture.slots["#graph"] = args[0]
        return self.ref(capture)

    def _do_make_graphed_callables(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return args[0] if args else NOTHING

    # Ranks.
    def together(self, args: list[Value]) -> None:
        """A sum over all ranks, or what they gather: of losses, counts and what else is no weight; or of gradients
        and weights, which are the same on all ranks then."""
        flats = [self.flat(each) for each in args]
        if flats and not any(each.flags & (GRAD | WEIGHTS) for each in flats):
            mask = 0
            for each in flats:
                mask |= each.losses
            self.trace.gathered.append((len(self.trace.events), mask))
        elif flats:
            self.trace.averaged.append(len(self.trace.events))

    def _do_get_rank(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return Value(const=0, env=RANKED)

    def _do_get_world_size(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return Value(const=8)

    def _do_all_gather_object(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        if len(args) < 2:
            return None
        for obj in args[0].refs:
            if obj.kind == "list":
                self.loosen(obj)
                self.heap.set(obj, "#elem", args[1])
            elif obj.kind == "tensor":
                self.write(obj, args[1], node)
        return NONE

    _do_all_gather = _do_all_gather_into_tensor = _do_all_gather_object
    _do_reduce_scatter_tensor = _do_all_to_all_single = _do_all_gather_object  # into the first what the second holds

    def _do_gather_object(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """dist.gather_object(mine, parts): the list comes second here."""
        return self._do_all_gather_object(name, args[1::-1], kwargs, node)

    def _do_all_reduce(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        in_place = "functional" not in name and ".nn" not in name and ("dist" in name or not args)
        return NONE if in_place or not self.flat(args[0]).losses else args[0]

    _do_broadcast = _do_barrier = _do_broadcast_object_list = _do_all_reduce

    def _do_synchronize(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return NONE

    def _do_Parameter(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        content = args[0] if args else kwargs.get("data", NOTHING)
        grows = kwargs.get("requires_grad")
        return self.grown(content, node, leaf=grows is None or grows.const is not False)

    _do_Buffer = _do_Parameter

    def _do_at(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """np.add.at(table, keys, value)"""
        if len(args) < 2:
            return None
        keys = list(args[1].items) if args[1].items is not None else [args[1]]
        for obj in args[0].refs:
            tokens = self.token_keys(keys, node)
            if tokens and obj.kind == "tensor":
                self.entered(obj, tokens, NOTHING, node)
            elif obj.kind == "tensor":
                self.write(obj, args[-1], node)
        return NONE

    def _do_DataLoader(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value | None:
        """DataLoader(dataset, collate_fn=put_together): batches of what the data set gives, as they are put together"""
        dataset = args[0] if args else kwargs.get("dataset", NOTHING)
        found = NOTHING
        for obj in dataset.refs:
            method = self.find(obj.data, "__getitem__") if obj.kind == "instance" else None
            one = self.ref(obj)
            row = self.call(method[0], [one, NOTHING], {}, node) if method else self.elements(one, node).any
            found = join(found, row)
        if not dataset.refs:
            found = self.elements(dataset, node).any
        collate = kwargs.get("collate_fn")
        if collate is not None and collate.const is not None:
            found = self.call(collate, [self._list_of(found, node)], {}, node)
        return self._list_of(found, node)

    def _do_Event(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return Value(flags=CLOCK) if "cuda" in name else self.ref(self.new("thing", name, node))

    def _do_SentencePieceProcessor(self, name: str, args: list[Value], kwargs: dict[str, Value], node: Any) -> Value:
        return self.ref(self.new("thing", name, node))
