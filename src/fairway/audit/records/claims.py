"""submission.json: its claims under whichever of the usual names they stand."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fairway.audit.verdict import Place

FILE = "submission.json"
_DIGITS = re.compile(r"\d[\d,]*(?:\.\d+)?")
_TOTAL = ("bytes_total", "total_bytes", "total_submission_bytes", "submission_bytes", "size_bytes", "total_size_bytes")
_CODE = ("bytes_code", "code_bytes", "code_size_bytes", "code_size")
_MODEL = ("model_bytes", "bytes_model", "compressed_model_bytes", "bytes_weights", "weights_bytes", "model_size_bytes")
_ARTIFACT = ("artifact_bytes", "bytes_artifact", "artifact_size", "artifact_size_bytes")
_SCORE = ("val_bpb", "mean_val_bpb", "val_bpb_mean", "bpb", "score", "val_bpb_exact", "bits_per_byte")
_DEVIATION = ("val_bpb_std", "std_val_bpb", "val_bpb_sd", "std", "stdev", "val_bpb_std_dev")
_BAR = (
    "sota_val_bpb",
    "sota_bpb",
    "previous_sota",
    "prior_sota",
    "sota",
    "bar",
    "baseline_val_bpb",
    "comparison_val_bpb",
)
_CHANCE = ("p_value", "p", "p_val")


@dataclass(frozen=True)
class Claims:
    """table: the whole file; text: as it was written. What it does not claim is None."""

    table: Mapping[str, Any]
    text: str = ""

    def at(self, value: float | None) -> Place:
        """Where a number is claimed: the first line that gives it."""
        for number, row in enumerate(self.text.split("\n"), 1):
            if value is not None and any(_float(text) == value for text in _DIGITS.findall(row)):
                return Place(FILE, number)
        return Place(FILE)

    @property
    def total(self) -> float | None:
        return self._number(_TOTAL)

    @property
    def code(self) -> float | None:
        return self._number(_CODE)

    @property
    def model(self) -> float | None:
        return self._number(_MODEL)

    @property
    def artifact(self) -> float | None:
        """What is called an artifact: the model's file, or all that is handed in."""
        return self._number(_ARTIFACT)

    @property
    def score(self) -> float | None:
        return self._number(_SCORE)

    @property
    def mean(self) -> float | None:
        """A score that is called a mean."""
        return self._number(("val_bpb_mean", "mean_val_bpb", "mean_bpb", "bpb_mean"))

    @property
    def deviation(self) -> float | None:
        return self._number(_DEVIATION)

    @property
    def bar(self) -> float | None:
        return self._number(_BAR)

    @property
    def bar_values(self) -> list[float]:
        """The seeds of the record before, where they are given as a list or by seed."""
        for key, value in self._walk(self.table):
            if re.search(r"(sota|baseline|previous|prior).*(seeds|values|runs|scores)", key, re.IGNORECASE):
                rows = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
                scores = [score for row in rows if (score := _score(row)) is not None]
                if len(scores) > 1:
                    return scores
        return []

    @property
    def chance(self) -> float | None:
        return self._number(_CHANCE)

    @property
    def unlimited(self) -> bool:
        """Whether it was handed in on a track without limits of time."""
        said = " ".join(str(self.table.get(name, "")) for name in ("track", "category", "type", "submission_type"))
        return bool(re.search(r"unlimited|non[-_ ]?record", said, re.IGNORECASE))

    def seeds(self) -> dict[int, float | None]:
        """seed -> its claimed score, or None where only the seed is named."""
        found: dict[int, float | None] = {}
        for key, value in self._walk(self.table):
            plain = key.lower()
            if plain == "seed" and _whole(value) is not None:
                found.setdefault(int(value), None)
            elif plain == "seeds" and isinstance(value, list):
                found |= {int(each): found.get(int(each)) for each in value if _whole(each) is not None}
            elif re.search("sota|baseline|previous|prior", plain):
                continue
            elif "seed" in plain and isinstance(value, Mapping):
                found |= {int(m[0]): _score(row) for seed, row in value.items() if (m := re.search(r"\d+", str(seed)))}
            elif "seed" in plain and isinstance(value, list):
                rows = [row for row in value if isinstance(row, Mapping) and _whole(row.get("seed")) is not None]
                found |= {int(row["seed"]): _score(row) for row in rows}
        return found

    def _walk(self, table: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
        for key, value in table.items():
            yield str(key), value
            if isinstance(value, Mapping) and depth < 2 and "seed" not in str(key).lower():
                yield from self._walk(value, depth + 1)

    def _number(self, names: tuple[str, ...]) -> float | None:
        plain = {key.lower(): value for key, value in self._walk(self.table)}
        found = [value for name in names if (value := _float(plain.get(name))) is not None]
        return found[0] if found else None


def _score(row: Any) -> float | None:
    """The score of one seed's row."""
    if not isinstance(row, Mapping):
        return _float(row)
    return next((value for name in _SCORE if (value := _float(row.get(name))) is not None), None)


def _float(value: Any) -> float | None:
    """A number, also where it is written as a text: "15,863,489"."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e15 else None
    found = re.fullmatch(r"\s*([\d,]+(?:\.\d+)?)\s*(?:bytes|B)?\s*", value) if isinstance(value, str) else None
    return float(found[1].replace(",", "")) if found and found[1].strip(",") else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
