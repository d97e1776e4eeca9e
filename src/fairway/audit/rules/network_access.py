"""Something is fetched from, or sent to, another machine while the score is made."""

import re

from fairway.audit.case import Case
from fairway.audit.terms.program import Program
from fairway.audit.terms.term import Term, any_below, walk
from fairway.audit.terms.things import Event
from fairway.audit.terms.verdicts import byte_factors, clean_as_read
from fairway.audit.verdict import Finding

ID = "network-access"
CHARGE = "the network is used during evaluation"
CLAUSE = "RULES.md R4"

_PACKAGES = re.compile(
    r"^(urllib\.request\.(urlopen|urlretrieve|Request|build_opener)|urllib3\.|requests\.|httpx\.|aiohttp\.|http\.client\."
    r"HTTPS?Connection|ftplib\.|smtplib\.|telnetlib\.|paramiko\.|boto3\.|gdown\.|wget\.|kagglehub\.|gcsfs\.|s3fs\."
    r"|huggingface_hub\.(hf_hub_download|snapshot_download|cached_download|HfApi|hf_hub_url|login|InferenceClient)|datasets\.load_dataset"
    r"|torch\.hub\.|socket\.create_connection|xmlrpc\.client|websockets?\.|openai\.|anthropic\.|transformers\.\w+\."
    r"from_pretrained|google\.cloud\.|modal\.Volume)"
)
_CLIENTS = re.compile(r"^(requests\.[Ss]ession|httpx\.(Async)?Client|aiohttp\.ClientSession|urllib3\.PoolManager)$")
_ASKING = frozenset(("get", "post", "put", "request", "urlopen", "head", "send", "stream"))
_COMMANDS = re.compile(
    r"\b(wget|curl|aria2c|git\s+clone|gsutil|rclone|huggingface-cli|hf\s+download|pip3?\s+install|aws\s+s3|scp)\b"
)
_STARTERS = frozenset(("run", "call", "check_call", "check_output", "Popen", "system", "popen", "getoutput"))
_SENDING = frozenset(("connect", "sendto", "sendall"))
_LEARNING = frozenset(("backward", "step", "value_and_grad", "grad", "minimize"))


def check(case: Case) -> Finding:
    program = case.reading.entry
    trained = min((event.order for event in program.called(*_LEARNING)), default=0)
    for event in program.events:
        said = _network(event.term)
        if said is None:
            continue
        counted = _always(case, event) and _counts_with(case, event.term)
        if event.order > trained or counted or _scores_with(case, event.term):
            evidence = f"{said} is called after training has begun, on the way to the score."
            if counted:
                evidence = f"What {said} fetches in the run itself counts the bytes that the score divides by."
            place = case.reading.place(event.term)
            return Finding(ID, "violates", evidence, CLAUSE, place, case.reading.way(event.term))
    return clean_as_read(case, ID, CLAUSE, _seen(program))


def _seen(program: Program) -> str:
    before = [event for event in program.events if _network(event.term)]
    if before:
        return f"the network is used before training only (line {before[0].term.line})"
    return "no call of a network client is reached"


def _network(term: Term) -> str | None:
    """What network client a call is, by the package it comes from or the program it starts."""
    name = str(term.value) if term.op == "call" else ""
    if _CLIENTS.match(name):
        return None  # the connection is opened by what is asked of it
    if _PACKAGES.match(name):
        return name
    if name.startswith(("subprocess.", "os.")) and term.called in _STARTERS:
        words = " ".join(str(t.value) for t in reversed(list(walk(*term.parts[:1]))) if t.op == "const")
        found = _COMMANDS.search(words)
        return f"{name} with {found.group(1)}" if found else None
    if term.called in _ASKING and term.receiver is not None:
        client = next((t for t in walk(term.receiver) if t.op == "call" and _CLIENTS.match(str(t.value))), None)
        return f"{client.value}().{term.called}" if client is not None else None
    if term.called in _SENDING and term.receiver is not None:
        made = any_below(term.receiver, lambda t: t.op == "call" and t.value == "socket.socket")
        return "a socket's " + term.called if made else None
    return None


def _scores_with(case: Case, fetched: Term) -> bool:
    """Whether what was fetched reaches a scored loss."""
    return any(any_below(one.term, lambda t: t is fetched) for one in case.reading.contributions)


def _always(case: Case, fetching: Event) -> bool:
    """Whether nothing stands between a fetch and the score but what both stand under: no "unless it lies here"."""
    under = fetching.conditions
    return any(number.event.conditions[: len(under)] == under for number in case.reading.reported)


def _counts_with(case: Case, fetched: Term) -> bool:
    """Whether the bytes are counted by what was fetched: by a tokenizer that lies on no disk here."""
    return any(any_below(term, lambda t: t is fetched) for term in byte_factors(case))
