"""What a recipe says about the score; the decoder's share of it travels in the artifact."""

from dataclasses import dataclass
from typing import Any, Literal

from fairway.artifact import Artifact
from fairway.base.slots import kind_of
from fairway.base.specs import build, choice, choices

Stage = Literal["float", "quantized", "sliding", "adapted"]


@dataclass(frozen=True)
class ScoreSpec:
    """result: the stage whose bits per byte is the score, named before the run."""

    result: Stage = "sliding"
    context: int = 0  # tokens of a window; 0: the model's training context
    windows: Any = choice("fairway.score.windows", "sliding")  # of the stages sliding and adapted
    adapt: Any = choice("fairway.score.adapt", "none")  # of the stage adapted
    reshape: tuple[Any, ...] = choices("fairway.score.reshape")  # of both: changes logits, in order
    temperature: float = 1.0  # divides every logit, fixed beforehand; one fitted on this text would be no score
    lanes: int = 1  # parts of the text that are read side by side, each from a past of its own; decoded together
    exact: bool = False  # the result in float64 and integer distributions, one CPU: what a decoder computes again
    snapshots: int = 0  # of an exact adapted score: the state is kept every so many chunks; 0: at the beginning alone
    block_tokens: int = 32768  # tokens of a forward: memory and speed only

    def __post_init__(self) -> None:
        if self.context < 0 or self.block_tokens < 1 or self.lanes < 1 or self.snapshots < 0:
            raise ValueError(
                f"context = {self.context}, block_tokens = {self.block_tokens}, lanes = {self.lanes}, "
                f"snapshots = {self.snapshots}: positive numbers are expected"
            )
        if self.snapshots and not self.exact:
            raise ValueError(f"snapshots = {self.snapshots}: the state is booked in exact mode alone; set exact = true")
        if self.adapts and self.adapt.chunk % self.lanes:
            raise ValueError(f"lanes = {self.lanes} does not divide adapt.chunk = {self.adapt.chunk}; choose a divisor")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature}: a positive number is expected")
        if self.result == "float":
            raise ValueError('result = "float": the artifact holds integers; name quantized, sliding or adapted')
        if self.result == "adapted" and not self.adapts:
            raise ValueError('result = "adapted", but adapt = "none"; name another result, or a technique of adapt')

    @property
    def adapts(self) -> bool:
        """Whether anything is learned from the scored text."""
        return kind_of(self.adapt) != "none"

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of a whole run, in order."""
        return ("float", "quantized", "sliding", "adapted") if self.adapts else ("float", "quantized", "sliding")


def spec_of(artifact: Artifact) -> ScoreSpec:
    """How the file says that it is to be scored."""
    return build(ScoreSpec, artifact.decoder.get("score", {}), "decoder.score")
