"""Settings as a script asks for them: the environment, and argparse."""

from __future__ import annotations

from contextvars import ContextVar

from fairway.audit.settings import UNKNOWN as UNSET
from fairway.audit.trial.core import Core
from fairway.audit.trial.values import UNKNOWN, Class, Obj, Value

group: ContextVar[tuple[int, int]] = ContextVar("group", default=(0, 1))
"""The rank of the process of the trial under way, and how many there are: as a rule it is alone."""
_RANK, _SIZE = ("RANK", "LOCAL_RANK"), ("WORLD_SIZE", "LOCAL_WORLD_SIZE")


def environ(machine: Core, args: tuple[Value, ...], kwargs: dict[str, Value], line: int) -> Value:
    name, default = args[0], args[1] if len(args) > 1 else kwargs.get("default")
    if name in (*_RANK, *_SIZE):
        return str(group.get()[name in _SIZE])
    found = machine.settings.environ(name, default)
    return UNKNOWN if found is UNSET else found


def _argument(machine: Core, option: str, default: Value, kind: Value) -> Value:
    turn = {"int": int, "float": float}.get(getattr(kind, "name", ""))
    found = machine.settings.argument(option, default, turn)
    return UNKNOWN if found is UNSET else found


class Parser:
    """argparse.ArgumentParser: the options with what the run command or their default gives. Those of all sub-commands
    are its own: which of them runs is settled in the script's tree (subcommands.py)."""

    def __init__(self, machine: Core, parents: Value = ()) -> None:
        self.machine = machine
        self.values: dict[str, Value] = {}
        for each in parents if isinstance(parents, (list, tuple)) else ():
            if isinstance(each, Parser):
                self.values.update(each.values)

    def add_argument(self, *names: Value, **kwargs: Value) -> None:
        plain = [str(each) for each in names if isinstance(each, str)]
        if plain:
            option = max(plain, key=len)
            name = kwargs.get("dest") or option.lstrip("-").replace("-", "_")
            default = kwargs.get("default", False if kwargs.get("action") == "store_true" else None)
            self.values[name] = _argument(self.machine, option, default, kwargs.get("type"))

    def add_argument_group(self, *_: Value, **__: Value) -> Parser:
        return self

    add_mutually_exclusive_group = add_argument_group

    def add_subparsers(self, *_: Value, **__: Value) -> Parser:
        return self

    def add_parser(self, *_: Value, parents: Value = (), **__: Value) -> Parser:
        below = Parser(self.machine, parents)
        self.values.update({name: value for name, value in below.values.items() if name not in self.values})
        below.values = self.values
        return below

    def set_defaults(self, **values: Value) -> None:
        self.values.update(values)

    def parse_args(self, *_: Value, **__: Value) -> Obj:
        return Obj(Class("Namespace", [], {}), dict(self.values))

    def parse_known_args(self, *_: Value, **__: Value) -> tuple[Obj, list[Value]]:
        return self.parse_args(), []
