"""Weighing: do the probabilities of all tokens that could stand at one place add up to one?

A score is paid for by probabilities, and what no decoder could use costs nothing: a bonus for the right hint that no
other token pays for, a row of counts divided by less than its sum, a gate that has read the target. Formulas of all
these kinds can be told by their form (audit/terms), and a form that nobody foresaw is not told. So this folder asks
the number itself. The trial (audit/trial) works the script through over a short text of ours, here with a made-up
model whose probabilities are known, so that caches, tilts and mixtures of the script work on numbers; the last token
of the text is then taken for each of the few that the model gives a probability, one run for each. What the script
says of them must add up to one at most: exp(-loss) summed over the tokens, RULES.md (b) 2.

    weighed(case, which) -> Weight | None      the sum, and where it is made; None where the trial cannot say
    foresees(case, which) -> bool | None       whether prices change where a text goes on otherwise from its middle
    excess(case) -> Weight | None              sums above one that nothing else explains
    timed(case) -> Overrun | None              the same idea for the 600 s of training: a trial whose clock is ours

More than one is a fault in any case. Less is none: what is left may lie on tokens that were not tried.
"""

from fairway.audit.weighing.alternatives import Weight, is_whole, of_itself, weighed
from fairway.audit.weighing.excess import excess
from fairway.audit.weighing.foreseeing import as_foreseen, foresees, is_sound
from fairway.audit.weighing.stream import PIECES
from fairway.audit.weighing.timing import FASTEST, Overrun, steps_after, timed

__all__ = [
    "FASTEST",
    "PIECES",
    "Overrun",
    "Weight",
    "as_foreseen",
    "excess",
    "foresees",
    "is_sound",
    "is_whole",
    "of_itself",
    "steps_after",
    "timed",
    "weighed",
]
