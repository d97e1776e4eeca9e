"""What a rule is given: a submission, its settings, and the trace of its script, computed once when first asked for."""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fairway.audit.flow.events import Trace
from fairway.audit.reading.script import Script
from fairway.audit.reading.tree import nodes
from fairway.audit.settings import Settings, read
from fairway.audit.submission import Submission
from fairway.audit.verdict import Place

if TYPE_CHECKING:
    from fairway.audit.passes.reported import Reported
    from fairway.audit.preparing import Preparations
    from fairway.audit.terms.reading import Reading
    from fairway.audit.trial import Trial
    from fairway.audit.weighing import Weight

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


class on_demand(cached_property[Any]):
    """What only some findings ask for, and what takes seconds: not prepared for every case."""


@dataclass(frozen=True)
class Case:
    """strict: accepted departures count as violations."""

    submission: Submission
    strict: bool = False

    @property
    def script(self) -> Script:
        """The script whose score is claimed."""
        return self.submission.entry

    @property
    def tree(self) -> ast.Module | None:
        """Its syntax tree, None where it could not be read."""
        return self.submission.entry.tree

    @cached_property
    def body(self) -> Script:
        """The script itself; of a few lines that only unpack and execute another, the one that is executed."""
        scripts = [script for script in self.script.all() if script.tree is not None]
        whole = [script for script in scripts if any(isinstance(node, _FUNCTIONS) for node in nodes(script.tree))]
        return self.script if self.script in whole or not whole else whole[0]

    def place(self, line: int) -> Place:
        """A line of that script, as a place."""
        return Place(self.body.path, self.body.line(line))

    @cached_property
    def settings(self) -> Settings:
        """What the run command, the README and the logs say of its switches."""
        submission = self.submission
        texts = [("README.md", submission.readme), ("run.sh", submission.command), *submission.logs.items()]
        trees = [script.tree for script in self.script.all() if script.tree is not None]
        return read(self.script.path, [(path, text) for path, text in texts if text], trees, submission.tables)

    @cached_property
    def trace(self) -> Trace:
        """What the script does, in order."""
        from fairway.audit.flow.machine import run

        return run(self.script, self.settings)

    @cached_property
    def tried(self) -> "Trial":
        """What the script's own arithmetic makes of a short text, with batches as large as it has them."""
        from fairway.audit.trial import run

        return run(self.script, self.settings)

    @cached_property
    def trial(self) -> "Trial":
        """The same, in batches of two where no step that learns came about otherwise."""
        from fairway.audit.trial import in_pairs

        steps = (each for each in self.trace.updates if each.how == "gradient")
        learns = any(tok.data == "val" for step in steps for tok in step.learned)
        return in_pairs(self.tried, self.script, self.settings) if learns else self.tried

    @cached_property
    def preparations(self) -> "Preparations":
        """What its scripts do wrong where they prepare data, tried with documents of our own."""
        from fairway.audit.preparing import preparations

        return preparations(self)

    @cached_property
    def failures(self) -> dict[str, Exception]:
        """What could not be worked out for a reason of our own, by the name of the part: a fact, and no verdict."""
        return {}

    def _weighed(self, part: str, ask: Callable[["Case", "Reported"], Any]) -> Any:
        """What weighing says; None where nobody can tell."""
        from fairway.audit.passes.charged import passes_of

        try:
            return ask(self, passes_of(self)[0])
        except Exception as error:  # whatever an unseen script brings about
            self.failures[part] = error
            return None

    @on_demand
    def weight(self) -> "Weight | None":
        """What the probabilities of a token add up to in the score."""
        from fairway.audit.weighing import weighed

        return self._weighed("weight", weighed)

    @on_demand
    def foresees(self) -> bool | None:
        """Whether a price hangs on what comes after its token; None where nobody can tell."""
        from fairway.audit.weighing import foresees

        return self._weighed("foresees", foresees)

    @on_demand
    def itself(self) -> "Weight | None":
        """What the probabilities of a token behind one that was never met add up to, where that is too much."""
        from fairway.audit.weighing import of_itself

        return self._weighed("itself", of_itself)

    @cached_property
    def reading(self) -> "Reading":
        """How the script computes its values: terms down to constants, files and settings."""
        from fairway.audit.terms.reading import Reading

        return Reading(self.submission, self.settings)
