"""How often the lab's intervals cover and its tests err, where the truth is known: what the docstrings of
src/fairway/lab/statistics.py say.

    python bench/chances.py [--times 20000]

Seeds: normal scores of unequal spread and number, that differ in nothing. Documents: log-normal lengths and differences
whose deviation grows as length^0.75, symmetric or skewed; the same with the plain delta method (D - 1 degrees of
freedom, residuals as they are), and with a test by flipping signs. Bar: seeds that `seeds_needed_of_both` asks for,
against how often so many more do reach it.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from fairway.lab.statistics import paired, paired_by_size, seeds_needed_of_both, student_tail, welch

Floats = npt.NDArray[np.float64]
Drawn = np.random.Generator


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--times", type=int, default=20_000, help="simulated sweeps of each kind")
    times = asked.parse_args().times
    seeds(times)
    documents(times)
    bar(times // 10)


def seeds(times: int) -> None:
    print("seeds               interval covers   p < 0.05   p < 0.01")
    for ours, theirs, ratio in ((2, 2, 1), (3, 3, 1), (3, 3, 3), (3, 5, 2), (5, 3, 2), (10, 10, 1)):
        drawn = np.random.default_rng([ours, theirs, ratio])
        found = [
            welch(drawn.normal(1.7, 0.002 * ratio, ours).tolist(), drawn.normal(1.7, 0.002, theirs).tolist())
            for _ in range(times)
        ]
        print(f"Welch {ours:2} x{ratio}, {theirs:2}   {_told(found)}")
    drawn = np.random.default_rng(0)
    noise = [(drawn.normal(1.7, 0.004, 3), drawn.normal(0, 0.001, (2, 3))) for _ in range(times)]
    print(f"paired, 3 seeds   {_told([paired((both + a).tolist(), (both + b).tolist()) for both, (a, b) in noise])}")


def documents(times: int) -> None:
    print("\ndocuments                     as in the lab                        plain delta             signs flipped")
    print(
        "                              covers   p < 0.05   p < 0.01         p < 0.05   p < 0.01     p < 0.05   p < 0.01"
    )
    shapes: dict[str, Callable[[Drawn, int], Floats]] = {
        "normal": lambda drawn, count: drawn.normal(0, 1, count),
        "t, 3": lambda drawn, count: drawn.standard_t(3, count),
        "skewed": lambda drawn, count: drawn.exponential(1, count) - 1,
    }
    for count in (12, 34, 200):
        for sigma in (0.0, 1.0, 1.5):
            for name, shape in shapes.items():
                drawn = np.random.default_rng([count, int(10 * sigma), len(name)])
                texts = []
                for _ in range(times):
                    sizes = drawn.lognormal(0, sigma, count)
                    texts.append((sizes**0.75 * shape(drawn, count), sizes))
                lab = _told([paired_by_size(*text) for text in texts])
                plain = _rates([_delta(*text) for text in texts])
                flipped = _rates([_flipped(text[0], drawn) for text in texts[: times // 10]])
                print(f"{count:4}, sigma {sigma}, {name:8}   {lab}   {plain}   {flipped}", flush=True)


def bar(times: int) -> None:
    """Three seeds of each, the better one 1.5 deviations over the bar: of those told that k more would do, how many
    get there with k fresh ones?"""
    drawn, reached, told = np.random.default_rng(1), list[bool](), list[int | None]()
    for _ in range(times):
        ours, theirs = drawn.normal(-0.011, 0.004, 3).tolist(), drawn.normal(0, 0.004, 3).tolist()
        more = seeds_needed_of_both(ours, theirs, -0.005)
        told.append(more)
        if more:
            ours, theirs = (
                ours + drawn.normal(-0.011, 0.004, more).tolist(),
                theirs + drawn.normal(0, 0.004, more).tolist(),
            )
            reached.append(welch(ours, theirs, -0.005).below < 0.01)
    known = sorted(more for more in told if more is not None)
    print(
        f"\nbar: {known.count(0) / times:.1%} met at once, {told.count(None) / times:.1%} never; the middle one of "
        f"the others asks for {known[len(known) // 2]} more; with as many "
        f"{np.mean(reached):.1%} of them get there"
    )


def _told(found: list) -> str:  # type: ignore[type-arg]
    covers = np.mean([one.low <= 0 <= one.high for one in found])
    return f"{covers:12.2%} {_rates([one.below for one in found])}"


def _rates(chances: list[float]) -> str:
    return f"{np.mean(np.array(chances) < 0.05):10.2%} {np.mean(np.array(chances) < 0.01):10.2%}"


def _delta(differences: Floats, sizes: Floats) -> float:
    ratio, count = differences.sum() / sizes.sum(), len(sizes)
    error = math.sqrt(count / (count - 1) * ((differences - ratio * sizes) ** 2).sum()) / sizes.sum()
    return student_tail(-ratio / error, count - 1)


def _flipped(differences: Floats, drawn: Drawn) -> float:
    signs = 2 * drawn.integers(0, 2, (2_000, len(differences))) - 1
    return float((1 + (signs @ differences <= differences.sum()).sum()) / 2_001)


if __name__ == "__main__":
    main()
