"""Prepares `.venv` with fairway and its tools: `make setup`, or `python scripts/setup.py`.

Standard library only, and readable by older Pythons so that they are refused in one line instead of a traceback.

1. A stamp in `.venv` holds the hash of what it was made from: when nothing changed, there is nothing to do.
2. Where PyTorch's own index can be reached, uv installs everything and chooses the build for this machine's GPU or CPU.
3. Elsewhere pip does, held to constraints.txt. Pip cannot choose between the CPU and the CUDA build, so a dry run comes
   first, and a Linux machine without an NVIDIA driver is never sent several gigabytes of CUDA without having asked.

A set-up that was interrupted goes on at the next call.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / ".fairway-setup"
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = ".[dev]"
OLDEST = (3, 11)
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
DISK = 2_000_000_000  # bytes: .venv with a CPU build takes 1.3 GB, and pip unpacks beside it
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNREACHABLE = (  # what pip prints, of all versions since 22
    "NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable|"
    "Temporary failure in name resolution|Connection refused"
)


class Refusal(Exception):
    """Set-up cannot go on; one or two lines that say why and what to do."""


# What to decide, apart from what to do.


def too_old(version: "tuple[int, ...]") -> str:
    """The line for a Python that is too old, or ""."""
    if tuple(version[:2]) >= OLDEST:
        return ""
    found = f"{version[0]}.{version[1]}"
    return f"Python {found} is too old: fairway needs 3.11 or newer; name one, as in: make setup PYTHON=python3.12"


def packages(report: "dict[str, Any]") -> "dict[str, str]":
    """Name -> version of what pip's dry-run report would install."""
    return {item["metadata"]["name"].lower(): item["metadata"]["version"] for item in report.get("install", [])}


def cuda_packages(names: "list[str]") -> "list[str]":
    """Those that come only with a CUDA build of torch."""
    return sorted(name for name in names if re.match(r"(nvidia|cuda)-|(pytorch-)?triton$", name))


def needs_consent(system: str, driver: bool, names: "list[str]", consent: bool, torch: str) -> str:
    """Why not to install `names` here without having asked, or ""; `torch` is the version to name in the advice."""
    cuda = cuda_packages(names)
    if system != "linux" or driver or consent or not cuda:
        return ""
    return f"""stopped, nothing installed: no NVIDIA driver here, and pip would fetch {len(cuda)} CUDA packages (GBs)
the CPU build: .venv/bin/python -m pip install torch=={torch} --index-url {TORCH_INDEX} && make setup
the CUDA build all the same: make setup SETUP=--cuda"""


def pinned(constraints: str) -> str:
    """The version of torch that the constraints name."""
    found = re.search(r"^torch==([0-9.]+)", constraints, re.MULTILINE)
    if found is None:
        raise Refusal(f"{CONSTRAINTS}: no line torch==VERSION; restore the file")
    return found.group(1)


def explain(output: str) -> str:
    """One line for what pip printed while it failed."""
    if re.search(UNREACHABLE, output):
        return (
            "the package index cannot be reached; connect to the network (or point pip to your own index), then again"
        )
    missing = re.search(r"No matching distribution found for (\S+)", output)
    if missing:
        return f"no build of {missing.group(1)} for this Python and system; try another: make setup PYTHON=python3.12"
    if "No space left on device" in output:
        return f"the disk is full; set-up needs {DISK / 1e9:.0f} GB"
    errors = [line for line in output.splitlines() if re.match(r"\s*(ERROR|error):", line)]
    return "pip: " + (errors[-1].split(":", 1)[1].strip() if errors else "failed without a word")


def nvidia_driver(root: Path = Path("/")) -> bool:
    """Whether the kernel has an NVIDIA driver (the last one is WSL's)."""
    places = ("proc/driver/nvidia/version", "dev/nvidia0", "usr/lib/wsl/lib/libcuda.so.1")
    return any((root / place).exists() for place in places) or shutil.which("nvidia-smi") is not None


def key(root: Path) -> str:
    """The hash of all that `.venv` is made from; the place is part of it, as scripts in `.venv` name it."""
    content = [(root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt", "scripts/setup.py")]
    return hashlib.sha256(b"\0".join([str(root).encode(), *content])).hexdigest()


def is_ready(stamp: Path, python: Path, wanted: str) -> bool:
    return python.exists() and stamp.is_file() and stamp.read_text() == wanted


# What to do.


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepares .venv with fairway and its tools.")
    parser.add_argument("--cuda", action="store_true", help="accept a CUDA build of torch without an NVIDIA driver")
    arguments = parser.parse_args()
    wanted = key(ROOT)
    if is_ready(STAMP, PYTHON, wanted):
        return
    begun = time.monotonic()
    os.chdir(ROOT)
    os.environ.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    if torch_version() is None and shutil.disk_usage(ROOT).free < DISK:
        raise Refusal(f"{ROOT}: less than {DISK / 1e9:.0f} GB of disk are free; free some, or clone elsewhere")
    STAMP.unlink(missing_ok=True)
    make_venv()
    sweep()
    uv = find_uv() if torch_version() is None and reachable(f"{TORCH_INDEX}/torch/") else None
    if uv is None or not install_with_uv(uv):
        install_with_pip(arguments.cuda)
    temporary = STAMP.with_suffix(".new")
    temporary.write_text(wanted)
    temporary.replace(STAMP)
    say(f"ready after {time.monotonic() - begun:.0f} s, torch {torch_version()}; next: make run")


def make_venv() -> None:
    """Makes `.venv`, again from nothing where it is half made or its Python is gone."""
    if PYTHON.exists() and quiet([str(PYTHON), "-m", "pip", "--version"])[0] == 0:
        return
    say(f"making .venv with Python {VERSION}")
    code, output = quiet([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code and re.search("ensurepip|No module named '?venv", output):
        raise Refusal(f"this Python has no venv module; on Debian and Ubuntu: sudo apt install python{VERSION}-venv")
    if code:
        raise Refusal(f"{VENV} could not be made: {(output.strip().splitlines() or ['no reason given'])[-1]}")


def sweep() -> None:
    """Removes the marks of packages whose installation was cut short, so that they are not taken for whole."""
    for mark in installed("*"):
        if not (mark / "RECORD").is_file():
            shutil.rmtree(mark, ignore_errors=True)


def find_uv() -> "str | None":
    """uv on the path, or else fetched into `.venv`."""
    found = shutil.which("uv")
    if found is None and quiet([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"])[0] == 0:
        found = shutil.which("uv", path=str(PYTHON.parent))
    return found


def install_with_uv(uv: str) -> bool:
    say("installing with uv, which chooses torch's build for this machine")
    command = [uv, "pip", "install", "--python", str(PYTHON), "--torch-backend=auto", "-e", PROJECT]
    if subprocess.run(command, check=False).returncode == 0:
        return True
    say("uv did not manage (above); going on with pip")
    return False


def install_with_pip(consent: bool) -> None:
    pip = [str(PYTHON), "-m", "pip", "install"]
    # A torch that is there already was chosen by hand (a CPU build, say): it stays, within pyproject.toml's range.
    what = ["-e", PROJECT] if torch_version() else ["-c", str(CONSTRAINTS), "-e", PROJECT]
    say("asking pip what it would install")
    found = packages(dry_run(pip, what))
    refusal = needs_consent(sys.platform, nvidia_driver(), list(found), consent, pinned(CONSTRAINTS.read_text()))
    if refusal:
        raise Refusal(refusal)
    with_torch = f", torch {found['torch']} among them: a minute or more" if "torch" in found else ""
    say(f"installing {len(found)} packages{with_torch}")
    talk = [] if sys.stderr.isatty() else ["-qq"]  # on a terminal pip shows its own progress
    code, output = heard([*pip, *talk, *what])
    if code:
        raise Refusal(explain(output))


def dry_run(pip: "list[str]", what: "list[str]") -> "dict[str, Any]":
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        code, output = quiet([*pip, "--dry-run", "--quiet", "--retries", "2", "--report", str(report), *what])
        if code:
            raise Refusal(explain(output))
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def installed(name: str) -> "list[Path]":
    """Where `.venv` keeps what it knows of the package `name`."""
    place = "Lib/site-packages" if os.name == "nt" else "lib/python*/site-packages"
    return sorted(VENV.glob(f"{place}/{name}-*.dist-info"))


def torch_version() -> "str | None":
    """torch's version in `.venv`, found without importing it."""
    found = installed("torch")
    return found[-1].name[len("torch-") : -len(".dist-info")] if found else None


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False


def quiet(command: "list[str]") -> "tuple[int, str]":
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def heard(command: "list[str]") -> "tuple[int, str]":
    """Runs a command that talks to the terminal itself; its errors are shown and also returned."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr or ():
            lines.append(line)
            sys.stderr.write(line)
        return process.wait(), "".join(lines)


def say(text: str) -> None:
    print("setup: " + text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    refused = too_old(sys.version_info[:2])
    if refused:
        sys.exit(f"setup: {refused}")
    try:
        main()
    except Refusal as refusal:
        sys.exit(f"setup: {refusal}")
    except KeyboardInterrupt:
        sys.exit("setup: stopped; make setup goes on from here")
