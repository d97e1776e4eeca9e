"""A log, or an artifact, of other code than the one that was handed in: the evidence is void."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from fairway.audit.case import Case
from fairway.audit.commands import Command
from fairway.audit.records import Log, Record, record_of
from fairway.audit.records.configuration import agree, commanded, is_setting
from fairway.audit.records.folder import same_code
from fairway.audit.verdict import Finding, Place

ID = "foreign-artifact-or-log"
CHARGE = "A log or an artifact comes from other code than the script that was handed in."
CLAUSE = "R11; (c) artifact or log of other code"
WITHOUT_SCRIPT = True

_NAMED = re.compile(r"""(?<![\w./-])["']?([A-Za-z_]\w{2,})["']?\s*[:=](?![/=])""")
_REPR = re.compile(r"(?:[\w ]+[:=] ?)?(\w*[A-Z]\w*)\(\w+=")
_HEAD = 400  # lines in which settings are printed
_LONGEST = 20_000  # characters of such a line
_OTHERS = 12  # names on which two logs differ: beyond that they are logs of two scripts, and other checks say so
_SETTINGS = 4  # fewer names on a line are no dump of settings
_SCRIPTS = ("script", "train_gpt", "source", "code", "code_file")
_FILES = (".json", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".py")
_OF_THE_RUN = ("seed", "path", "dir", "file", "id", "name", "host", "time", "date", "rank", "port", "device", "memory")


def check(case: Case) -> Finding:
    """Compares source, hashes, code sizes and settings of every log with the script and with one another."""
    record = record_of(case.submission)
    if not record.logs:
        return Finding(ID, "clean", "open: no log was handed in", CLAUSE)
    found = [
        each
        for log in record.logs
        for each in (_source(record, log), _hash(case, record, log), _size(record, log))
        if each
    ]
    found += [each for path, text in sorted(case.submission.logs.items()) if (each := _unknown(record, path, text))]
    found += [*_settings(case, record), *_artifact(case, record), *_of_nobody(case), *_seed_of_another(record)]
    violating = [each for each in found if each.verdict == "violates"]
    if violating or found:
        first = (violating or found)[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return Finding(ID, first.verdict, first.evidence + more, CLAUSE, first.place)
    compared = sum(bool(log.source or log.hashes or log.codes) for log in record.logs)
    says = f"{compared} of {len(record.logs)} logs carry source, hash or code size, and all agree with the script"
    return Finding(
        ID, "clean", says if compared else "open: the logs carry neither source nor hash nor code size", CLAUSE
    )


def _source(record: Record, log: Log) -> Finding | None:
    """The source at the log's head against every text that the entry executes."""
    texts = [script.text for script in record.entry.all()]
    if not log.source or any(same_code(log.source, text) for text in texts):
        return None
    nearest = max(texts, key=lambda text: difflib.SequenceMatcher(None, log.source[:2000], text[:2000]).quick_ratio())
    left, right = log.source.split("\n"), nearest.split("\n")
    line = next((n for n, (a, b) in enumerate(zip(left, right, strict=False), 1) if a.rstrip() != b.rstrip()), 0)
    shown = f": `{left[line - 1].strip()[:70]}` against `{right[line - 1].strip()[:70]}`" if line else ""
    evidence = f"{log.path} carries another source than {record.entry.path} from line {line or len(left)} on{shown}"
    return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, line or len(left)))


def _hash(case: Case, record: Record, log: Log) -> Finding | None:
    """A hash that the log gives for the script, whole or its first digits."""
    texts = [script.text.encode() for script in record.entry.all()]
    path = case.submission.root / record.entry.path
    texts += [path.read_bytes()] if path.is_file() else []
    own = {hashlib.new(kind, text).hexdigest() for kind in ("sha256", "sha1", "md5") for text in texts}
    named = {name: value for name, value in log.hashes.items() if name in _SCRIPTS}
    wrong = {name: value for name, value in named.items() if not any(each.startswith(value) for each in own)}
    if not wrong:
        return None
    name, value = next(iter(wrong.items()))
    shown = hashlib.sha256(texts[0]).hexdigest()[:12]
    kind = "sha256" if len(value) == 64 else "the hash"
    evidence = f"{log.path} gives {kind} {value[:12]}… for the {name}, and {record.entry.path} has {shown}… (sha256)"
    text = case.submission.logs[log.path].lower()
    return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, text[: text.find(value)].count("\n") + 1))


def _size(record: Record, log: Log) -> Finding | None:
    """The code size that the log printed against the files'."""
    if not log.codes or log.source:
        return None
    said = log.codes[-1]
    counts = record.code_counts()
    if int(said.value) in counts:
        return None
    if 0.5 * record.packed_bytes <= said.value < 0.6 * record.code_bytes:
        return None  # the length of a packed wrapper: size-sum speaks of it
    evidence = f"{log.path} says {said.value:,.0f} bytes of code, and {record.entry.path} has {record.code_bytes:,}"
    return Finding(ID, "violates", evidence, CLAUSE, Place(log.path, said.line))


def _settings(case: Case, record: Record) -> list[Finding]:
    """Settings of the script that two logs print differently; suspect where a command says that a run had this one."""
    found = []
    first, *others = _of_the_claim(record)
    trees = [script.tree for script in case.script.all() if script.tree is not None]
    for other in others:
        both = [name for name in first.settings if name in other.settings and not _of_the_run(name)]
        differing = [name for name in both if not agree(first.settings[name], other.settings[name])]
        tabled = first.tabled & other.tabled
        own = [name for name in differing if name in tabled or is_setting(name, trees)]
        if not own or len(differing) > _OTHERS:
            continue
        commands = case.settings.commands
        silent = [name for name in own if not _said(name, (first, other), commands)]
        name = (silent or own)[0]
        evidence = (
            f"{other.path} ran with {name} = {other.settings[name]}, {first.path} with {first.settings[name]}: "
            "the seeds do not share one configuration"
        )
        evidence += "" if silent else "; a command says so"
        place = Place(other.path, _line_of(name, case.submission.logs[other.path]))
        found.append(Finding(ID, "violates" if silent else "suspect", evidence, CLAUSE, place))
    return found


def _of_the_claim(record: Record) -> list[Log]:
    """The logs of the seeds that are claimed, where that is said of at least two; else all: an ablation's is no
    evidence for the score."""
    seeds = record.claims.seeds()
    claimed = [log for log in record.logs if log.seed is not None and log.seed in seeds and _scored(log, seeds)]
    return claimed if len(claimed) > 1 else list(record.logs)


def _scored(log: Log, seeds: Mapping[int, float | None]) -> bool:
    """Whether a log ends with the score that is claimed for its seed, where one is."""
    claim = seeds.get(log.seed) if log.seed is not None else None
    final = log.final.bits_per_byte if log.final is not None else None
    return claim is None or final is None or abs(claim - final) < 0.002


def _said(name: str, logs: tuple[Log, Log], commands: Sequence[Command]) -> bool:
    """Whether the commands tell of a difference between two logs."""
    return any(commanded(name, log.settings[name], commands) for log in logs)


def _line_of(name: str, text: str) -> int:
    rows = enumerate(text.split("\n"), 1)
    return next((number for number, row in rows if re.search(rf"\b{re.escape(name)}['\"]?\s*[:=]", row)), 1)


def _of_nobody(case: Case) -> list[Finding]:
    """Settings that every log tells alike, and that neither the script nor a command nor the README has."""
    submission = case.submission
    lines = "\n".join((submission.readme, submission.command, *submission.tables.values())).lower().split("\n")
    given = [value for command in case.settings.commands for value in command.arguments.items()]
    if any("config" in name or str(value).endswith(_FILES) for name, value in given):
        return []  # a file says what ran
    for told in (each for each in submission.told if each.file and case.settings.commands):
        name = told.name.rpartition(".")[2]
        spoken = any(re.search(rf"(?<![a-z]){re.escape(name.lower())}(?![a-z])", line) for line in lines)
        if spoken or told.name in case.settings.arguments or name in case.settings.arguments:
            continue
        if _spelt(name, told.value, case.script.text):  # in a table of its own, laid over the defaults
            continue
        evidence = (
            f"{told.file} ran with {told.name} = {told.value}; the script's own value is {told.default}, and no "
            "command gives another"
        )
        place = Place(told.file, _line_of(name, submission.logs[told.file]))
        return [Finding(ID, "violates", evidence, CLAUSE, place)]
    return []


def _spelt(name: str, value: object, text: str) -> bool:
    """Whether a text gives a setting this value, as JSON or Python spell it."""
    try:
        spelt = re.escape(json.dumps(value))
    except (TypeError, ValueError):
        return False
    return re.search(rf"\b{re.escape(name)}['\"]?\s*[:=]\s*{spelt}", text) is not None


def _seed_of_another(record: Record) -> list[Finding]:
    """The log that is named after one claimed seed and was made with the seed of another log."""
    claimed = record.claims.seeds()
    for log in record.logs:
        named = [int(digits) for digits in re.findall(r"\d+", log.path.rpartition("/")[2]) if int(digits) in claimed]
        if log.seed is None or not named or log.seed in named:
            continue
        other = next((each for each in record.logs if each.seed == log.seed and each is not log), None)
        if other is not None and all(each.seed not in named for each in record.logs):
            evidence = f"{log.path} was run with seed {log.seed}, as {other.path} was; no log is of seed {named[0]}"
            return [Finding(ID, "violates", evidence, CLAUSE, Place(log.path, log.seed_line))]
    return []


def _artifact(case: Case, record: Record) -> list[Finding]:
    """The sha256 that logs give for the artifact against the one that lies here, where it is one of theirs by size."""
    given = {log.artifact_hash: log for log in record.logs if log.artifact_hash}
    sizes = {int(log.models[-1].value) for log in record.logs if log.models}  # the last one is packed
    sizes -= {int(log.models[-1].value) for log in record.logs if log.models and not log.artifact_hash}  # another run's
    files = [path for path, size in record.sizes.items() if size in sizes]
    if not given or len(files) != 1:
        return []
    data = (case.submission.root / files[0]).read_bytes()
    if hashlib.sha256(data).hexdigest() in given:
        return []
    log = next(iter(given.values()))
    evidence = f"{log.path} gives sha256 {log.artifact_hash[:12]}… for the artifact, and that of {files[0]} is another"
    text = case.submission.logs[log.path].lower()
    line = text[: text.find(log.artifact_hash)].count("\n") + 1
    return [Finding(ID, "violates", evidence, CLAUSE, Place(log.path, line))]


def _unknown(record: Record, path: str, text: str) -> Finding | None:
    """A line of settings, most of which the script has, with one whose words stand nowhere in it."""
    code = "\n".join(script.text for script in record.entry.all()).lower()
    words = set(re.findall(r"[a-z]+", code))
    for number, row in enumerate(text.splitlines()[:_HEAD], 1):
        if len(row) > _LONGEST or "environ" in row or "import " in row:
            continue
        made = _REPR.match(row.strip())
        if made is not None and made[1].lower() not in code:
            continue  # a library's object tells of itself: its properties, its defaults
        names = [name for name in _NAMED.findall(row) if name == name.lower()]  # not the environment of a command
        if len(set(names)) < _SETTINGS:
            continue
        known = {name for name in names if name in code}
        strange = [name for name in names if "_" in name and _is_strange(name, words)]
        if strange and len(known) >= max(_SETTINGS - 1, len(strange)):
            evidence = (
                f"{path} prints the setting {strange[0]} beside {', '.join(sorted(known)[:3])}, and "
                f"{record.entry.path} has no such setting"
            )
            return Finding(ID, "violates", evidence, CLAUSE, Place(path, number))
    return None


def _is_strange(name: str, words: set[str]) -> bool:
    """Whether a part of a name stands nowhere in the code: the name was not put together there either."""
    return any(len(part) >= 4 and part not in words for part in re.findall(r"[a-z]+", name))


def _of_the_run(name: str) -> bool:
    return any(word in name.lower().split("_") for word in _OF_THE_RUN)
