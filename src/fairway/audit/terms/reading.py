"""All that the rules of the sums ask of a submission, computed once: its programs and what they report."""

from functools import cached_property

from fairway.audit.settings import Settings
from fairway.audit.submission import Submission
from fairway.audit.terms.gates import Gates
from fairway.audit.terms.program import Program, Programs, place_of, programs
from fairway.audit.terms.report import Fraction, Number, Report, fractions
from fairway.audit.terms.streams import Streams
from fairway.audit.terms.targets import Contribution, contributions
from fairway.audit.terms.term import Term
from fairway.audit.verdict import Place, Step


class Reading:
    """The entry and its companions as programs; `reported`: the numbers that are the score."""

    def __init__(self, submission: Submission, settings: Settings) -> None:
        self.submission = submission
        self.programs: Programs = programs(submission, settings)
        self.report = Report(self.programs.entry, submission)

    @property
    def entry(self) -> Program:
        return self.programs.entry

    @property
    def reported(self) -> list[Number]:
        return self.report.reported

    @cached_property
    def fractions(self) -> list[tuple[Number, Fraction]]:
        """Every reported number that has a logarithm of 2, as a fraction."""
        found: list[tuple[Number, Fraction]] = []
        for number in self.reported:
            if self.report.flags.of(number.term)[0] or len(self.reported) == 1:
                found.extend((number, fraction) for fraction in fractions(number.term))
        return found

    def is_loss(self, term: Term) -> bool:
        """Whether losses are in a term."""
        return self.report.flags.of(term)[1]

    @cached_property
    def losses(self) -> list[Term]:
        """What the score sums: the numerators of the reported numbers."""
        ups = [term for _, fraction in self.fractions for term in fraction.up if self.is_loss(term)]
        return ups or [number.term for number in self.reported]

    @cached_property
    def contributions(self) -> list[Contribution]:
        """What the numerators add up, each with its target."""
        streams = Streams()
        found: dict[tuple[str, int], Contribution] = {}
        for loss in self.losses:
            for one in contributions(loss, streams):
                if self.is_loss(one.term):  # not the number of tokens that a mean is multiplied by
                    found.setdefault(place_of(one.term), one)
        return list(found.values())

    @cached_property
    def gates(self) -> list[Gates]:
        """The contributions with what they do with their targets."""
        return [Gates(contribution) for contribution in self.contributions]

    @cached_property
    def denominators(self) -> list[Term]:
        """What the score divides by, besides logarithms: counts of tokens and of bytes."""
        return [term for _, fraction in self.fractions for term in fraction.down if not self.is_loss(term)]

    def way(self, *terms: Term) -> tuple[Step, ...]:
        """From the reported number back to these terms."""
        steps = []
        for number in self.reported[-1:]:
            steps.append(Step(self.place(number.event.term), f"the score is said here{_quoted(number.label)}"))
        for term in terms:
            steps.append(Step(self.place(term), "it is computed here"))
        return tuple(steps)

    def place(self, term: Term) -> Place:
        file, line = place_of(term)
        return Place(file or self.entry.script.path, line)


def _quoted(label: str) -> str:
    words = " ".join(label.replace("\0", "…").split())
    return f': "{words[:60]}"' if words else ""
