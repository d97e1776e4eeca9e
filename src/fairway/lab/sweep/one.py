"""One run of a sweep, in a process of its own: a crash, a full memory or a loss that is not finite costs one run.

The process ends when its standard input closes, as on Ctrl-C: training first writes a checkpoint. So a sweep that was
killed leaves none behind on its machine. (A batch job of Slurm holds its process itself and goes on: `scancel` it, or
let it end, before the sweep is called again.)
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fairway
from fairway.base.errors import FairwayError, RecipeError
from fairway.base.journal import Run
from fairway.base.memory import keep_freed
from fairway.base.ranks import Ranks

LOG = "run.log"  # in the run folder: what `fairway run` would print
HOUSE = Path(fairway.__file__).parents[1]
GRACE = 600.0  # seconds that an interrupted run has for its checkpoint, before it ends without one
WAIT = 60.0  # seconds for an earlier process of the same run to end and let the folder go


@dataclass(frozen=True)
class Job:
    """A run to be made: its folder holds the resolved recipe. threads: on a CPU."""

    id: str
    folder: Path
    device: str
    threads: int
    place: Path  # the working directory: a recipe's paths count from it
    training: str = ""  # a hash of its training: of equal ones, one begins when the other has ended
    log: str = ""  # tensorboard or wandb: where its points and facts go, too


@dataclass(frozen=True)
class Ended:
    """How a run's process ended. error: one line, or "" where it finished."""

    id: str
    seconds: float
    error: str = ""
    interrupted: bool = False


class Child:
    """The process of a run, and what it says at its end."""

    def __init__(self, job: Job, gpu: str | None = None) -> None:
        self.job, self.begun = job, time.monotonic()
        self.ended: Ended | None = None
        job.folder.mkdir(parents=True, exist_ok=True)
        with (job.folder / LOG).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fairway.lab.sweep.one", str(job.folder), job.device, job.log],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=job.place,
                env=_environment(job, gpu),
                start_new_session=True,  # a terminal's Ctrl-C would come beside ours: a second one writes no checkpoint
            )

    def poll(self) -> Ended | None:
        """How it ended, once it has; asked again, the same."""
        if self.ended is not None or self.process.poll() is None:
            return self.ended
        self.stop()
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            said = pipe.read().splitlines()
        try:
            answer = dict(json.loads(said[-1]))
        except (IndexError, ValueError, TypeError):
            code = self.process.returncode
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            answer = {"error": f"its process was ended by {how}, as where memory runs out; see {self.job.folder / LOG}"}
        self.ended = Ended(self.job.id, round(time.monotonic() - self.begun, 1), **answer)
        return self.ended

    def stop(self) -> None:
        """Asks it to end, with a checkpoint where it trains."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def run_one(job: Job) -> Ended:
    """Runs a job to its end, in a process of its own on this machine: what an engine maps over the unfinished runs."""
    child = Child(job)
    try:
        child.process.wait()
    except BaseException:  # the engine interrupts its worker
        child.stop()
        child.process.wait()
        raise
    ended = child.poll()
    assert ended is not None
    return ended


def main(folder: str, device: str, log: str) -> None:
    """The process itself. Its last line on standard output says how it ended."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    keep_freed()
    answer: dict[str, object] = {}
    try:
        _run(Path(folder), device, log)
    except FairwayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        answer = {"error": f"{type(error).__name__}: {error}"}
    except KeyboardInterrupt:
        answer = {"error": "interrupted", "interrupted": True}
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        answer = {"error": f"{type(error).__name__}: {first}; see {Path(folder) / LOG}"}
    print(json.dumps(answer), flush=True)


def _run(folder: Path, device: str, log: str) -> None:
    from fairway import pipeline, steps
    from fairway.base.devices import choose
    from fairway.lab.submit import checkout
    from fairway.lab.sweep.book import score_of
    from fairway.lab.sweep.trained import equals, take_weights
    from fairway.verbs.opening import recipe_of

    chosen, target, code = recipe_of(folder), choose(device), checkout()
    with _opened(folder, log) as opened:
        if score_of(folder, chosen.name, chosen.seed) is not None:
            return  # the process of a sweep that was killed came to its end while this one waited for the folder
        alike = equals(chosen, sorted(set(folder.parent.iterdir()) - {folder}))
        if alike:
            steps.begin(chosen, opened, target, code)
            steps.prepare(chosen, opened, steps.refuse_overlap)
            taken = take_weights(chosen, opened, alike)
            if taken is not None:
                opened.say(f"train         the weights of {taken.name}: an equal training")
        pipeline.run(chosen, opened, target, code)


def _opened(folder: Path, log: str) -> Run:
    """The run folder's; an earlier process of a sweep that was killed may need its time to end."""
    from fairway.lab.logs import LoggedRun

    until = time.monotonic() + WAIT
    while True:
        try:
            return LoggedRun(folder, Ranks(), False, None, log) if log else Run(folder, quiet=False)
        except RecipeError:
            if time.monotonic() > until or not os.access(folder, os.W_OK):
                raise
            time.sleep(0.2)


def _end_with_parent() -> None:
    while os.read(0, 1024):  # not sys.stdin: the interpreter's end would wait for its lock
        pass
    main_thread = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main_thread is not None:
        signal.pthread_kill(main_thread, signal.SIGINT)  # to the main thread: a wait there ends, too
    else:
        signal.raise_signal(signal.SIGINT)
    time.sleep(GRACE)
    os._exit(130)


def python_path() -> str:
    """PYTHONPATH for a process that is to run this very code, wherever it starts."""
    return os.pathsep.join(filter(None, (str(HOUSE), os.environ.get("PYTHONPATH"))))


def _environment(job: Job, gpu: str | None) -> dict[str, str]:
    environment = {**os.environ, "PYTHONPATH": python_path()}
    environment.setdefault("OMP_NUM_THREADS", str(job.threads))
    return environment if gpu is None else {**environment, "CUDA_VISIBLE_DEVICES": gpu}


if __name__ == "__main__":
    main(*sys.argv[1:])
