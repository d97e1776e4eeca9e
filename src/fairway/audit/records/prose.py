"""What a README says that the evaluation took: in a sentence, a list or a table.

Training 585 s. Evaluation takes 803 s on 8xH100.        803 s
| TTT (12 epochs per 32K chunk) | 1,091 s |              1,091 s
"""

import re
from collections.abc import Iterator

from fairway.audit.records.log import Amount
from fairway.audit.records.numbers import Number, numbers

_EVALUATES = re.compile(r"\beval|\bttt\b|test[- ]time|\bslot\b|\bsliding|\bscor(?:e|ing)\b", re.IGNORECASE)
_ELSE = re.compile(
    r"(?<!test-time )(?<!test time )\btrain|quanti|gptq|calibr|compil|limit|\bcap\b|budget|allow|under|below|within|"
    r"at most|reserve|deadline|timeout|guard|whole run|everything|\bper\b|each|every|step|save",
    re.IGNORECASE,
)
_ASIDE = re.compile(
    r"\b(?:would|could|must|may|can|if|not|limit of|allow\w*|one|single)\b|earlier|previous|before|instead|baseline|"
    r"at first|too (?:slow|long)|without|over (?:the )?(?:budget|limit)|rather than|ablation|rejected|unlimited|"
    r"non-?record|\b1 ?x ?h|a100|h200|rtx|4090|3090|\bcpu\b|laptop|local",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[^\d\s])[.;!?](?=\s)|(?<=\d)[.;!?](?=\s)|$")
_TAKES = r"\b(?:took|takes|lasted|lasts|needed|needs|(?:ran|runs) for)\b"
_CLAUSE = re.compile(rf"[,;:.|](?=\s)|\band\b|\bwith\b(?![^,;:.|]*{_TAKES})|\bthen\b|\+|->|\*\*")
_VERB = re.compile(rf"^\s*(?:then\s+)?{_TAKES}")
_INSERTED = re.compile(r"^\s*(?:from|with|including|which|that|all|plus|on)\b|.*\d", re.IGNORECASE)
_OUTSIDE = re.compile(
    r"\b(?:before|outside|off|not (?:on|in|under)) (?:of )?(?:the |that |its )?(?:\w*eval\w* )?(?:clock|timer)\b",
    re.IGNORECASE,
)
_PARENTHESES = re.compile(r"\([^()]*\)")
_LONGEST = 4_000  # characters of a line: what is longer is no prose
_BEGINS = re.compile(r"^\s*(?:#|[-*+>] |\d+[.)] |```|~~~)")  # a heading, an item, code: no sentence goes on there
_WRAPPED = 60  # characters: shorter lines are broken off for a reason
_RULE = re.compile(r"^\s*\|?[\s:|-]*-[\s:|-]*\|[\s:|-]*$")  # below the head of a table


def evaluation_times(readme: str) -> list[Amount]:
    """The seconds that are said to be those of an evaluation, each with its line and what says so; what is said of
    other machines, other scripts or a limit is none."""
    found: list[Amount] = []
    head: list[str] = []
    begun = ""  # a sentence that a line before broke off
    rows = readme.split("\n")
    for line, row in enumerate(rows, 1):
        if row.lstrip().startswith("|") and len(row) < _LONGEST:
            if line < len(rows) and _RULE.match(rows[line]):
                head = _cells(row)
            found += [Amount(line, row.strip()[:120], seconds) for seconds in _in_table(_cells(row), head)]
            begun = ""
            continue
        head = []
        row = row[:_LONGEST]
        text = f"{begun} {row}" if begun and row.strip() and not _BEGINS.match(row) else row
        found += [Amount(line, said[:120], seconds) for said, seconds in _in_sentences(text, len(text) - len(row))]
        begun = _unfinished(text) if len(row) >= _WRAPPED and not _BEGINS.match(row) else ""
    return found


def _unfinished(text: str) -> str:
    """The sentence that a line breaks off; "" where it ends one."""
    text = text.rstrip()
    return "" if text[-1:] in (".", "!", "?", ":", ";") else _SENTENCE.split(text)[-2][-_LONGEST:].strip()


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _in_table(cells: list[str], head: list[str]) -> Iterator[float]:
    """The times of a row whose first cell, or whose column, is called an evaluation."""
    for column, cell in enumerate(cells):
        read = [(each, seconds) for each in numbers(cell) if (seconds := _time(each)) is not None]
        over = head[column] if len(head) == len(cells) else ""
        if column and len(read) == 1 and (_evaluates(cells[0]) or _evaluates(over)) and not _is_aside(cells, over):
            yield read[0][1]


def _is_aside(cells: list[str], over: str) -> bool:
    return any(_ASIDE.search(cell) for cell in (*cells, over)) or bool(over and _ELSE.search(over))


def _in_sentences(row: str, after: int) -> Iterator[tuple[str, float]]:
    """What is said of an evaluation, by numbers that stand after some characters."""
    begin = 0
    for end in _SENTENCE.finditer(row):
        said, at, begin = row[begin : end.end()], begin, end.end()
        if _ASIDE.search(said):
            continue
        for each in numbers(said):
            if at + each.at < after:
                continue
            seconds = _time(each)
            before = _PARENTHESES.sub(" ", said[: each.at]).replace("(", " ")
            if seconds is not None and _evaluates(_subject(_CLAUSE.split(before.rstrip(" :*|")))):
                yield said.strip(), seconds


def _subject(clauses: list[str]) -> str:
    """The clause before a number; of `The evaluation, from loading to the last chunk, takes` the one that says what."""
    if not _VERB.match(clauses[-1]):
        return clauses[-1]
    return next((each for each in clauses[-2::-1] if each.strip() and not _INSERTED.match(each)), clauses[-1])


def untimed(readme: str) -> list[Amount]:
    """The seconds of work that is said to be done outside the clock of the evaluation."""
    found: list[Amount] = []
    lines = readme.split("\n")
    for line, row in enumerate(lines, 1):
        text = " ".join(each[:_LONGEST] for each in lines[line - 1 : line + 1])
        for outside in _OUTSIDE.finditer(text):
            said = _SENTENCE.split(text[: outside.start()])[-2]
            times = [each for each in numbers(said) if _time(each) is not None and text.find(said) + each.at < len(row)]
            found += [Amount(line, (said + outside[0]).strip()[:120], _time(each) or 0.0) for each in times[-1:]]
    return found


def _time(each: Number) -> float | None:
    return None if each.is_rate or each.over else each.seconds


def _evaluates(label: str) -> bool:
    """Whether words are those of an evaluation alone."""
    label = _PARENTHESES.sub(" ", label)
    return bool(_EVALUATES.search(label)) and not _ELSE.search(label)


__all__ = ["evaluation_times", "untimed"]
