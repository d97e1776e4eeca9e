"""Many submissions in parallel processes, each bounded in time and memory: one that breaks its bounds costs itself."""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairway.audit.submission import holds_script
from fairway.audit.verdict import Finding, Place, Report, Step
from fairway.base.errors import DataError

SECONDS = 60.0  # for one submission


def submissions(path: Path) -> list[Path]:
    """What there is to audit: the script or the record folder itself, or everything in a folder of these, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; name a script or a record folder")
    inner = [each for each in sorted(path.iterdir()) if not each.name.startswith((".", "__"))]
    folders = [each for each in inner if each.is_dir() and _holds(each)]
    scripts = [each for each in inner if each.is_file() and each.suffix in (".py", ".ipynb")]
    if scripts and (_one(path, scripts) or not (folders or len(scripts) > 1)):
        return [path]
    found = [*(each for folder in folders for each in submissions(folder)), *scripts]
    if not found:
        raise DataError(f"{path}: no Python script here; name a script, a record folder or a folder of these")
    return sorted(found)


def _one(path: Path, scripts: Sequence[Path]) -> bool:
    """Whether a folder is one submission: it has what a record has."""
    names = {each.name for each in scripts}
    return "train_gpt.py" in names or (path / "submission.json").is_file() or any(path.glob("*.log"))


def _holds(folder: Path, depth: int = 4) -> bool:
    if holds_script(folder):
        return True
    inner = [each for each in folder.iterdir() if each.is_dir() and not each.name.startswith((".", "__"))]
    return depth > 0 and any(_holds(each, depth - 1) for each in inner)


def audit_all(
    paths: Sequence[Path],
    strict: bool = False,
    workers: int = 0,
    seconds: float = SECONDS,
    told: Callable[[int, Report], None] = lambda done, report: None,
) -> list[Report]:
    """A Report for every path, in order. told: (how many are done, the newest); workers: 0 is one for each core; where
    there are more cores than workers, each shares its work out among as many processes."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(paths)):
        waiting.put(number)
    reports: list[Report | None] = [None] * len(paths)
    came: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
    stop = threading.Event()

    def serve() -> None:
        worker = _Worker()
        try:
            while not stop.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                reports[number] = worker.audit(paths[number], strict, seconds, cores // size)
                came.put(number)
        except BaseException as error:  # the caller's thread raises it
            came.put(error)
        finally:
            worker.end()

    cores = os.cpu_count() or 1
    size = min(workers or cores, len(paths))
    crew = [threading.Thread(target=serve, daemon=True) for _ in range(size)]
    for each in crew:
        each.start()
    try:
        for done in range(1, len(paths) + 1):
            newest = came.get()
            if isinstance(newest, BaseException):
                raise newest
            told(done, _there(reports[newest]))
    finally:
        stop.set()
        for each in crew:
            each.join()
    return [_there(report) for report in reports]


def _there(report: Report | None) -> Report:
    assert report is not None
    return report


class _Worker:
    """A process that audits, started when first needed and again when it had to be ended."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.rest = b""

    def audit(self, path: Path, strict: bool, seconds: float, processes: int = 1) -> Report:
        started = time.monotonic()
        process = self._alive()
        assert process.stdin is not None
        asked = {"path": str(path), "strict": strict, "processes": max(processes, 1)}
        try:
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
            answer = self._line(process, seconds)
        except (BrokenPipeError, EOFError):
            return self._lost(path, started, "the reading process died, for want of memory as a rule")
        except TimeoutError:
            return self._lost(path, started, f"reading it takes more than {seconds:.0f} s")
        if answer.pop("last", False):
            self.end()
        if "refused" in answer:
            return unread(path, str(answer["refused"]), time.monotonic() - started)
        return reported(answer)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process, self.rest = None, b""

    def _alive(self) -> "subprocess.Popen[bytes]":
        if self.process is not None and self.process.poll() is not None:
            self.end()
        if self.process is None:
            command = [sys.executable, "-m", "fairway.audit.worker"]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
            )
        return self.process

    def _lost(self, path: Path, started: float, why: str) -> Report:
        self.end()
        return unread(path, why, time.monotonic() - started)

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> dict[str, Any]:
        """The next answer; TimeoutError, or EOFError where the process ended without one."""
        assert process.stdout is not None
        until, parts = time.monotonic() + seconds, [self.rest]
        while b"\n" not in parts[-1]:
            ready, _, _ = select.select([process.stdout], [], [], max(until - time.monotonic(), 0))
            if not ready:
                raise TimeoutError
            more = os.read(process.stdout.fileno(), 1 << 20)
            if not more:
                raise EOFError
            parts.append(more)
        line, _, self.rest = b"".join(parts).partition(b"\n")
        return dict(json.loads(line))


def unread(path: Path, why: str, seconds: float) -> Report:
    """The report on a submission that could not be examined at all: "cannot tell" under every rule."""
    from fairway.audit.examine import rule_modules

    said = f"cannot read {path.name}: {why}" if str(path) not in why else f"cannot read {why}"
    place = Place(path.name)
    findings = [Finding(rule.ID, "cannot tell", said, rule.CLAUSE, place) for rule in rule_modules()]
    facts = {"path": str(path), "cannot_read": {path.name: why}, "seconds": round(seconds, 3)}
    return Report(path.stem if path.is_file() else path.name, tuple(findings), facts)


def reported(plain: dict[str, Any]) -> Report:
    """A Report from what its `plain` gave."""
    return Report(plain["name"], tuple(_finding(each) for each in plain["rules"]), plain["facts"])


def _finding(plain: dict[str, Any]) -> Finding:
    place = Place(plain["file"], plain["line"] or 0) if plain["file"] else None
    way = tuple(Step(Place(each["file"], each["line"]), each["what"]) for each in plain["way"])
    exemption = plain["exemption"] or ""
    return Finding(plain["id"], plain["verdict"], plain["evidence"], plain["clause"], place, way, exemption)
