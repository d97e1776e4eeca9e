"""Closes a process before somebody else's code runs in it: no network, few files, limits of memory and time."""

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any

_NEW_USER, _NEW_NET = 0x10000000, 0x40000000
_NETWORK = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.sendmsg",
    "socket.getaddrinfo",
    "socket.gethostby",
)
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
_SYSTEM = (
    "/usr",
    "/lib",
    "/lib64",
    "/etc",
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/sys",
    "/dev",
)


def limited(memory: int, seconds: int) -> list[str]:
    """Sets the limits that the system has; which ones it has not."""
    try:
        import resource
    except ImportError:
        return ["memory and time (this system has no limits for a process)"]
    wanted = {"RLIMIT_DATA": memory, "RLIMIT_CPU": seconds, "RLIMIT_FSIZE": 64_000_000, "RLIMIT_CORE": 0}
    missing = []
    for name, most in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (most, most))
        except (AttributeError, ValueError, OSError):
            missing.append(name)
    return missing


def without_network() -> str:
    """Leaves the machine's network for an empty one; how, or "" where the system does not allow it. Before threads."""
    if not sys.platform.startswith("linux"):
        return ""
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_NEW_NET, _NEW_USER | _NEW_NET):
        if libc.unshare(flags) == 0:
            return "an empty network namespace"
    return ""


class Watch:
    """Refuses, by Python's audit hooks, network, programs, and files outside `roots`; keeps what was tried.

    A hook sees what goes through Python; a compiled extension can go around it, but not around the namespace.
    """

    def __init__(self, roots: Sequence[str], writable: str) -> None:
        self.roots = tuple(os.path.realpath(root) for root in (*roots, *_SYSTEM))
        self.writable = os.path.realpath(writable)
        self.tried: list[str] = []
        self.on = True

    def begin(self) -> None:
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            self._open(*arguments)
        elif event.startswith(_NETWORK):
            self._refuse(f"network: {event} {_shown(arguments[1:])}")
        elif event.startswith(_PROGRAMS):
            self._refuse(f"program: {event} {_shown(arguments[:2])}")

    def _open(self, path: Any, mode: Any, flags: Any) -> None:
        if isinstance(path, int):
            return
        real = os.path.realpath(os.fsdecode(path))
        writing = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        roots = (self.writable, "/dev/null", "/dev/shm") if writing else (*self.roots, self.writable)
        if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in roots):
            self._refuse(f"{'file to write' if writing else 'file'}: {real}")

    def _refuse(self, what: str) -> None:
        if len(self.tried) < 50:
            self.tried.append(what[:200])
        raise PermissionError(f"sealed: {what[:200]}")


def _shown(arguments: Sequence[Any]) -> str:
    return " ".join(str(each)[:80] for each in arguments)
