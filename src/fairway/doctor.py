"""What this machine can do, as plain data: `fairway doctor` prints it.

Every check answers in words and says what to do where something is missing. Nothing here touches the network, and
nothing is imported that a missing package could break; torch alone takes about two seconds.
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "missing", "warning"]


@dataclass(frozen=True)
class Check:
    """One finding. state: "missing" for what the core or an extra lacks, "warning" for what works, but badly."""

    name: str
    state: State
    found: str
    remedy: str = ""  # what to do; empty where nothing is wrong


CORE = {  # distribution -> (module, what it is for)
    "numpy": ("numpy", "arrays"),
    "sentencepiece": ("sentencepiece", "tokenizers"),
    "constriction": ("constriction", "exact coding of text and weights"),
    "brotli": ("brotli", "packing, baselines"),
    "safetensors": ("safetensors", "float weights"),
    "pydantic": ("pydantic", "recipes"),
    "typer": ("typer", "the command line"),
}
EXTRAS = {  # distribution -> (module, what it is for)
    "matplotlib": ("matplotlib", "plots in reports"),
    "tensorboard": ("tensorboard", "run --log tensorboard"),
    "wandb": ("wandb", "run --log wandb"),
    "huggingface_hub": ("huggingface_hub", "fairway data fetch"),
    "pyarrow": ("pyarrow", "parquet as a source of text"),
    "ray": ("ray", "sweeps on a cluster"),
    "submitit": ("submitit", "sweeps under Slurm"),
    "pytest": ("pytest", "the tests"),
}
DISK = 2_000_000_000  # bytes free below which long runs may end badly: checkpoints of the largest recipe take 0.5 GB
MEMORY = 2_000_000_000  # bytes below which the pocket recipe is at risk


def report() -> list[Check]:
    """All checks, in the order a person reads them: machine, torch, packages, project."""
    return [
        _python(),
        _cores(),
        _memory(),
        _disk(Path.cwd()),
        *_torch(),
        *(_package(name, *about, extra=False) for name, about in CORE.items()),
        _zstd(),
        *(_package(name, *about, extra=True) for name, about in EXTRAS.items()),
        _commit(Path(__file__).parent),
    ]


def _python() -> Check:
    found = f"{platform.python_version()} ({platform.python_implementation()}), {platform.platform(terse=True)}"
    if sys.version_info >= (3, 15):
        return Check("python", "warning", found, "not tried; 3.11 to 3.14 are known to have all packages")
    return Check("python", "ok", found)


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Check("cores", "ok", f"{usable} of {os.cpu_count()}, {platform.machine()}")


def _memory() -> Check:
    total = memory_bytes()
    if total is None:
        return Check("memory", "ok", "unknown on this system")
    state: State = "ok" if total >= MEMORY else "warning"
    return Check("memory", state, f"{total / 1e9:.1f} GB", "" if state == "ok" else "use a smaller batch")


def memory_bytes() -> int | None:
    """The memory this process may use: the machine's, or its container's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    state: State = "ok" if free >= DISK else "warning"
    return Check("disk", state, f"{free / 1e9:.0f} GB free here", "" if state == "ok" else "free some space")


def _torch() -> list[Check]:
    try:
        import torch
    except ImportError as error:
        return [Check("torch", "missing", str(error).splitlines()[0], "make setup")]
    checks = [Check("torch", "ok", torch.__version__)]
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        remedy = "this machine has an NVIDIA driver: install torch's CUDA build (docs/SETUP.md)" if driver else ""
        checks += [
            Check("device", "warning" if driver else "ok", f"cpu, {torch.get_num_threads()} threads", remedy),
            Check("bf16", "ok", "not used on CPU (17 times slower there): float32"),
            Check("compile", "ok", "not used on CPU: eager"),
        ]
        return checks
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    triton = importlib.util.find_spec("triton") is not None
    return [
        *checks,
        Check("device", "ok", f"{len(names)} × {names[0]}, {memory:.0f} GB, CUDA {torch.version.cuda}"),
        Check("bf16", "ok", "yes")
        if torch.cuda.is_bf16_supported()
        else Check("bf16", "warning", "emulated", "use a newer GPU, or --device cpu"),
        Check("compile", "ok", "yes") if triton else Check("compile", "missing", "no triton", "pip install triton"),
    ]


def _package(name: str, module: str, purpose: str, extra: bool) -> Check:
    """Whether a package is there, and of which version, without importing it."""
    if importlib.util.find_spec(module) is None:
        return Check(name, "missing", f"{'optional: ' if extra else ''}{purpose}", f"pip install {name}")
    return Check(name, "ok", _version(name))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "there, of unknown version"


def _zstd() -> Check:
    if sys.version_info >= (3, 14) and _is_there(lambda: importlib.util.find_spec("compression.zstd")):
        return Check("zstd", "ok", "of the standard library")
    if _is_there(lambda: importlib.util.find_spec("backports.zstd")):
        return Check("zstd", "ok", f"backports.zstd {_version('backports.zstd')}")
    return Check("zstd", "missing", "packing, baselines", "pip install backports.zstd")


def _is_there(find: Callable[[], object]) -> bool:
    try:
        return find() is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _commit(folder: Path) -> Check:
    """The commit of the code that runs, marked where files differ from it."""
    commit = git_commit(folder)
    if commit is None:
        return Check("commit", "ok", "none: not a git checkout")
    return Check("commit", "ok", commit)


def git_commit(folder: Path) -> str | None:
    """The short hash of the checkout that holds `folder`, with "+" where files differ from it; None where there is
    none, or where the checkout around `folder` is somebody else's (an installed package in a project's .venv)."""
    if not _git(folder, "ls-files", "."):
        return None
    return _git(folder, "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, or None where it fails, is missing or takes too long."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
