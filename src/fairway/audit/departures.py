"""Accepted departures: where merged records depart from the strict text of the rules (RULES.md (b), last list), by
name. The rules that find them are told in exemptions.py what to make of them."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Departure:
    """rule: the rule it is excepted from; what: what is let pass; precedent: where it was."""

    name: str
    rule: str
    what: str
    precedent: str


_KNOWN = (
    Departure(
        "documents-claimed-by-ranks",
        "adaptation-order-race",
        "documents sorted by length and claimed by ranks from a shared counter, each with an adapter of its own",
        "#1530 and its heirs, merged",
    ),
    Departure(
        "documents-by-length",
        "adaptation-order-race",
        "documents scored and learned from in the order of their lengths, which only the whole text tells",
        "#77, #1530 and their heirs, merged",
    ),
    Departure(
        "phased-adaptation",
        "training-before-scoring",
        "after a number of documents are scored, the model learns from those and goes on with the rest",
        "#1610, #1626, merged",
    ),
    Departure(
        "warm-up-on-validation",
        "training-before-scoring",
        "a compile warm-up that steps on validation tokens with an adapter that is thrown away; by our own reading, "
        "also one whose rate of 1e-8 or less moves no weight",
        "#1530, of an adapter, flagged and merged",
    ),
    Departure(
        "small-tail",
        "twice-counted-tokens",
        "the last tokens counted once for each short tail window: 960 or 1,984 of 62 million",
        "#50 and its heirs, merged; fixed in #1394",
    ),
    Departure(
        "self-generated-calibration",
        "calibration-after-cap",
        "calibration text written by the model itself after the training clock has stopped",
        "#1019, merged",
    ),
    Departure(
        "diagnostics-beside-the-clock",
        "eval-over-time",
        "passes that the result does not need, run beside an evaluation that keeps its time",
        "#1868, unsettled",
    ),
    Departure(
        "packed-code-count",
        "size-sum",
        "code counted as it weighs packed, where the script that was handed in is not packed",
        "#1412, merged, where less code was counted than lay in the folder",
    ),
    Departure(
        "smear-across-documents",
        "boundary-leak",
        "a gate that adds the embedding of the token before, also at a document's first token, in a text of one stream",
        "#1667, merged; ruled invalid in #1797",
    ),
)
DEPARTURES = {departure.name: departure for departure in _KNOWN}


def named(exemption: str) -> Iterator[Departure]:
    """The departures that a finding's exemption names: one, or several with commas between them."""
    for name in filter(None, exemption.split(", ")):
        yield DEPARTURES.get(name) or Departure(name, "", "", "")
