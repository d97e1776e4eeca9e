"""Processor time of training steps, with freed memory kept (fairway.base.memory) and given back, in turns.

    python bench/freed_memory.py [RECIPE] [--steps 30] [--turns 3]

Each turn is a process of its own on one thread; the first five steps are not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SKIPPED = 5
WAYS = ("given back", "kept")


def measure(name: str, steps: int, kept: bool) -> None:
    """Prints user and system seconds of `steps` steps."""
    import torch

    from fairway import steps as way
    from fairway.base.devices import choose
    from fairway.base.journal import Run
    from fairway.base.memory import keep_freed
    from fairway.lab.submit import checkout
    from fairway.recipe import load

    torch.set_num_threads(1)
    if kept and not keep_freed():
        sys.exit("freed memory cannot be kept here")
    begun: list[os.times_result] = []

    class Timed(Run):
        def point(self, curve: str, step: int, **values: float) -> None:
            if curve == "train" and step in (SKIPPED, SKIPPED + steps):
                begun.append(os.times())

    recipe = load(name, (f"train.schedule.steps={SKIPPED + steps}",))
    with tempfile.TemporaryDirectory() as folder, Timed(Path(folder) / "run") as run:
        way.begin(recipe, run, choose("cpu"), checkout())
        text = way.prepare(recipe, run, way.refuse_overlap)
        way.train(recipe, text, run, choose("cpu"))
    first, last = begun
    print(last.user - first.user, last.system - first.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="pocket_b6")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.way:
        measure(said.recipe, said.steps, said.way == "kept")
        return
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(1, said.turns + 1):
        for way in WAYS:
            call = [sys.executable, __file__, said.recipe, "--steps", str(said.steps), "--way", way]
            done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
            user, system = map(float, done.stdout.split())
            spent[way].append(user + system)
            print(f"turn {turn}  {way:<10}  {user:6.2f} s user  {system:5.2f} s system", flush=True)
    back, kept = (statistics.median(spent[way]) for way in WAYS)
    print(f"{said.steps} steps, median: {back:.2f} and {kept:.2f} s; kept / given back {kept / back:.3f}")


if __name__ == "__main__":
    main()
