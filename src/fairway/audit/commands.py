"""Run commands and printed settings, as a README, a shell file or a log says them."""

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_LAUNCH = re.compile(
    r"""(?P<env>(?:\b[A-Za-z_]\w*=(?:"[^"\n]*"|'[^'\n]*'|[^\s`"';&|]*)\s+)*)   # A=1 B="x" before the launcher
        (?P<launcher>(?:\S*/)?(?:torchrun|accelerate|python[\d.]*|uv\s+run|srun)\b[^\n`;&|]*?\s)
        (?P<script>[^\s`;&|"']+\.py)\b
        (?P<rest>[^\n`;&|>]*)""",
    re.VERBOSE,
)
_ASSIGNMENT = re.compile(r"""(?<![\w-])([A-Za-z_]\w*)=("[^"\n]*"|'[^'\n]*'|[^\s`"';&|]*)""")
_EXPORT = re.compile(r"^\s*(?:\$\s*)?(?:export|ENV)\s+(.*)$")
_BARE = re.compile(r"""^\s*[A-Z_][A-Z0-9_]*=(?:"[^"\n]*"|'[^'\n]*'|\S*)\s*(?:#.*)?$""")
_WORD = re.compile(r"(?<=\s)\+{0,2}([A-Za-z_][\w.]*)=([^\s`\"']+)")
_TASK = re.compile(r"\s+([A-Za-z][\w-]*)(?=\s|$)")
_PRINTED = re.compile(r"""(?<![\w.'"\[])['"]?([A-Za-z_]\w*)['"]?\s*[:=]\s*('[^'\n]*'|"[^"\n]*"|[^\s,;}]+)""")
_LOGGED_LINES = 4_000  # settings are printed at the start; source text before them may be 4,000 lines long


@dataclass(frozen=True)
class Command:
    """One line that starts a script. environment and arguments as texts; a bare flag is True; assigned: the words
    `part.name=text` among the arguments; task: a word of its own behind the script, as `prepare`."""

    file: str
    line: int
    script: str
    environment: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    assigned: dict[str, str] = field(default_factory=dict)
    task: str = ""


def commands_in(path: str, text: str, script: str) -> list[Command]:
    """The commands of one text that start the script of this file name, with what was exported before them."""
    exported: dict[str, Any] = {}
    commands = []
    for number, line in _logical_lines(text):
        export = _EXPORT.match(line)
        if export or _BARE.match(line):
            exported.update(_assignments(export.group(1) if export else line))
            continue
        for match in _LAUNCH.finditer(line):
            if match["script"].rsplit("/", 1)[-1] != script.rsplit("/", 1)[-1]:
                continue
            environment = {**exported, **_assignments(match["env"]), **_assignments(_env_of(match["launcher"]))}
            rest = match["rest"]
            arguments, assigned = _arguments(rest), dict(_WORD.findall(rest))
            task = _TASK.match(rest)
            told = (environment, arguments, assigned, task[1] if task else "")
            commands.append(Command(path, number, match["script"], *told))
    return commands


def _logical_lines(text: str) -> Iterable[tuple[int, str]]:
    """(number of the first, text) of lines, joined where a backslash ends them."""
    start, parts = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        start = start or number
        if len(line) > 20_000:  # a log may carry a whole archive on one line; no command is that long
            line = ""
        parts.append(line.rstrip().removesuffix("\\"))
        if not line.rstrip().endswith("\\"):
            yield start, " ".join(parts)
            start, parts = 0, []
    if parts:
        yield start, " ".join(parts)


def _env_of(launcher: str) -> str:
    """`env A=1 python` and `docker run -e A=1 python` say their settings behind the first word."""
    return launcher if "=" in launcher else ""


def _assignments(text: str) -> dict[str, Any]:
    return {name: _shell_value(value) for name, value in _ASSIGNMENT.findall(text)}


def _shell_value(text: str) -> str:
    """The value without quotes; `${NAME:-default}` is its default."""
    text = text.strip().strip("\"'")
    default = re.fullmatch(r"\$\{\w+:?-([^}]*)\}", text)
    return default.group(1) if default else text


def _arguments(rest: str) -> dict[str, Any]:
    """--option value, --option=value and bare flags; options as Python names."""
    words = rest.split("#")[0].split()
    found: dict[str, Any] = {}
    for index, word in enumerate(words):
        if not word.startswith("--") or len(word) < 3:
            continue
        name, equals, value = word[2:].partition("=")
        following = words[index + 1] if index + 1 < len(words) else "--"
        given: Any = value if equals else (True if following.startswith("--") else following)
        found[name.replace("-", "_")] = _shell_value(given) if isinstance(given, str) else given
    return found


def logged_in(logs: Iterable[str], known: Iterable[str]) -> Mapping[str, Any]:
    """name in lower case -> the literal that every log printed for it (`ttt_enabled: True`). Only known names count,
    and only those that were printed with one value: what changes from line to line is no setting."""
    wanted = {name.lower() for name in known}
    values: dict[str, set[str]] = {}
    for log in logs:
        for line in log.splitlines()[:_LOGGED_LINES] if wanted else ():
            if len(line) > 2_000 or _is_source(line):
                continue
            for name, printed in _PRINTED.findall(line):
                if name.lower() in wanted:
                    values.setdefault(name.lower(), set()).add(printed)
    single = {name: _literal(next(iter(printed))) for name, printed in values.items() if len(printed) == 1}
    return {name: value for name, value in single.items() if value is not None}


def _is_source(line: str) -> bool:
    """A log often begins with the source itself: a line that reads the environment prints no value."""
    return (
        "environ" in line or "getenv" in line or "add_argument" in line or bool(re.search(r"\bself\.|\bargs\.", line))
    )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text if re.fullmatch(r"[\w./-]+", text) else None
