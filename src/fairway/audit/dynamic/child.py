"""The sealed process: makes the predictor, asks for the text as it is paid, and says the distributions.

    python -m fairway.audit.dynamic.child FOLDER MODULE:OBJECT ROUTE MEMORY SECONDS SCRATCH

ROUTE: "plain" (as the predictor's own interface has it) or "steps" (fairway's interface, one step at a time).
"""

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairway.audit.dynamic import seal
from fairway.audit.dynamic.pipe import Message, Pipe


def main() -> None:
    folder, name, route, memory, seconds, scratch = sys.argv[1:7]
    incoming, outgoing = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for each in (0, 1, 2):
        os.dup2(nothing, each)
    pipe = Pipe(incoming, outgoing)
    sys.dont_write_bytecode = True
    network = seal.without_network()
    missing = seal.limited(int(memory), int(seconds))
    import numpy  # noqa: F401 - before the hook: what it opens is nobody's business

    watch = seal.Watch([folder, sys.prefix, sys.base_prefix, *filter(None, sys.path[1:])], scratch)
    try:
        watch.begin()
        make = _found(Path(folder), name)
        facts = {"network": network or "Python's audit hooks", "missing": missing}
        _serve(pipe, make, route, facts)
        pipe.send(Message("done", {"tried": watch.tried}))
    except BaseException as error:  # whatever it raises: it is said, never a traceback
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        pipe.send(Message("error", {"what": said, "tried": watch.tried}))


def _found(folder: Path, name: str) -> Callable[..., Any]:
    """MODULE:OBJECT of the folder; MODULE may be a path of a file in it."""
    module, _, wanted = name.partition(":")
    sys.path.insert(0, str(folder))
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location("submission", folder / module)
        if spec is None or spec.loader is None:
            raise ImportError(f"{module}: no Python file")
        made = importlib.util.module_from_spec(spec)
        sys.modules["submission"] = made
        spec.loader.exec_module(made)
    else:
        made = importlib.import_module(module)
    found: Any = made
    for part in wanted.split("."):
        found = getattr(found, part)
    return found


def _serve(pipe: Pipe, make: Callable[..., Any], route: str, facts: dict[str, Any]) -> None:
    from fairway.audit.dynamic import driven, plain

    takes = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty and p.kind in (0, 1)]
    if len(takes) >= 2:
        driven.serve(pipe, make, route, facts)
    else:
        plain.serve(pipe, make, facts)


if __name__ == "__main__":
    main()
