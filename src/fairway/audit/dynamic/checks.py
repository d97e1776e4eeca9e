"""The instruments, each a verdict: sums, ledger, probe, state, steps, a decoded slice, and what the seal refused."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fairway.audit.dynamic import asking
from fairway.audit.dynamic.asking import Answer, Asked, Connect, Failed, Heard, TextOf
from fairway.audit.verdict import Finding, Report, Verdict
from fairway.base.errors import ArtifactError, HonestyError, RecipeError

Ints = npt.NDArray[np.int64]
Told = Callable[[int], None]


class Ask(Protocol):
    """One run: the route, the text, and what decodes it where that is asked for."""

    def __call__(self, route: str, text: TextOf, answer: Answer | None = None) -> Heard: ...


CLAUSES = {
    "dynamic-seal": "R4: no network and no training data during evaluation",
    "dynamic-ledger": "(b) 4: every token contributes exactly one loss",
    "dynamic-sums": "(b) 2: a full distribution of sum 1",
    "dynamic-probe": "(b) 1: p_t depends on the artifact and on x_<t alone",
    "dynamic-state": "(b) 3: the state changes after the payment, not before",
    "dynamic-steps": "(b) 1: the distributions that are scored are those that a decoder has",
    "dynamic-decode": "(b) 1-4: a score is a file that decodes",
}
SUM = 1e-5  # |sum - 1| that a log-softmax in float32 over some 10,000 tokens may leave
APART = 1e-3  # nats between whole units and single steps: float32 sums of other shapes
RUNS = 7  # of the submission, at most: for the meter


def examine(
    folder: Path,
    name: str,
    text: Path | None = None,
    tokens: int = 160,
    flips: int = 3,
    seconds: float = 120.0,
    memory: int = 4_000_000_000,
    told: Told = lambda runs: None,
    connect: Connect | None = None,
) -> Report:
    """All instruments on MODULE:OBJECT of a folder.

    text: held-out bytes, each a token (default: a text made here and written nowhere); tokens: how many are told
    told: called with the number of runs done; connect: by default a sealed process
    RecipeError for a name that is none, a text where the submission may read it.
    """
    _named(folder, name)
    started = time.monotonic()
    source = _source(text, folder, tokens)

    def ask(route: str, text: TextOf, answer: Answer | None = None) -> Heard:
        return asking.ask(Asked(folder, name, route, seconds, memory), text, answer, connect)

    try:
        base = ask("plain", source)
    except (Failed, HonestyError) as error:
        return _report(name, _stopped(error), {"seconds": time.monotonic() - started})
    told(1)
    findings = [_sealed(base), _ledger(base), _sums(base), _state(base)]
    findings += [_probe(ask, source, base, flips, told)]
    if base.facts.get("interface") == "fairway" and base.facts.get("steps"):
        stepped, finding = _steps(ask, source, base)
        findings.append(finding)
    else:
        stepped = base
    findings.append(_decode(ask, source, stepped))
    told(RUNS)
    facts = {
        "interface": base.facts.get("interface"),
        "sealed_by": base.facts.get("network"),
        "limits_missing": base.facts.get("missing"),
        "refused": list(base.tried),
        "vocab": base.vocab,
        "tokens": len(base.rows),
        "told_ahead": base.ahead,
        "bits_per_token": base.nats / np.log(2) / len(base.rows),
        "seconds": round(time.monotonic() - started, 3),
    }
    return _report(name, findings, facts)


def _named(folder: Path, name: str) -> None:
    module, colon, wanted = name.partition(":")
    if not colon or not module or not wanted:
        raise RecipeError(f"--dynamic = {name!r}: write MODULE:OBJECT, such as model:Predictor")
    if not folder.is_dir():
        raise RecipeError(f"--dynamic: {folder} is no folder; name the one that holds {module}")


def _source(path: Path | None, folder: Path, count: int) -> TextOf:
    """The text as a function of the vocabulary."""
    if path is None:
        return lambda vocab: _made(vocab, count)
    if path.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"--text {path}: it lies in the submission's folder, where the submission may read it")
    try:
        content = np.frombuffer(path.read_bytes()[:count], np.uint8).astype(np.int64)
    except OSError as error:
        raise RecipeError(f"--text {path}: {error.strerror}; name a file that can be read") from error
    if len(content) < 16:
        raise RecipeError(f"--text {path}: {len(content)} bytes; give at least 16")
    return lambda vocab: np.concatenate([[0], content % vocab])


def _made(vocab: int, count: int) -> Ints:
    """A text of its own kind: words of a few tokens that come again, so that a learner has something to learn."""
    random = np.random.default_rng(20260425)
    words = [random.integers(0, vocab, size) for size in random.integers(1, 6, 24)]
    chosen = np.concatenate([words[int(each)] for each in random.zipf(1.5, 4 * count) % len(words)])
    return np.concatenate([[0], chosen[:count]]).astype(np.int64)


def _finding(name: str, verdict: Verdict, evidence: str) -> Finding:
    return Finding(name, verdict, evidence, CLAUSES[name])


def _stopped(error: Failed | HonestyError) -> list[Finding]:
    """The first run did not come to its end: why, and nothing else can be told."""
    if isinstance(error, HonestyError):
        first = _finding("dynamic-ledger", "violates", str(error))
    elif any(each.startswith("network") for each in error.tried):
        first = _finding("dynamic-seal", "violates", f"it asked for the network: {error.tried[0]}")
    else:
        first = _finding("dynamic-seal", "cannot tell", f"it did not come to the end: {error.why}")
    rest = [each for each in CLAUSES if each not in (first.id, "dynamic-steps")]
    return [first, *(_finding(each, "cannot tell", f"the run stopped before: {error}") for each in rest)]


def _sealed(base: Heard) -> Finding:
    network = [each for each in base.tried if each.startswith("network")]
    programs = [each for each in base.tried if each.startswith("program")]
    if network:
        return _finding("dynamic-seal", "violates", f"it asked for the network: {network[0]}")
    if programs:
        return _finding("dynamic-seal", "suspect", f"it tried to start another program: {programs[0]}")
    refused = f"; {len(base.tried)} files outside its folder were refused, first {base.tried[0]}" if base.tried else ""
    return _finding("dynamic-seal", "clean", f"it ran without network ({base.facts.get('network')}){refused}")


def _ledger(base: Heard) -> Finding:
    bits = base.nats / np.log(2) / len(base.rows)
    return _finding(
        "dynamic-ledger", "clean", f"{len(base.rows)} of {len(base.rows)} tokens paid once: {bits:.4f} bits each"
    )


def _sums(base: Heard) -> Finding:
    if base.sums is None:
        return _finding("dynamic-sums", "clean", f"logits over all {base.vocab} tokens, normalised in float64 here")
    off, position = base.sums
    if off > SUM:
        evidence = f"the distribution of position {position} sums to 1 {'±'} {off:.3g}, and {SUM:.0e} is allowed"
        return _finding("dynamic-sums", "violates", evidence)
    return _finding("dynamic-sums", "clean", f"{len(base.rows)} distributions sum to 1 within {off:.1e}")


def _state(base: Heard) -> Finding:
    if base.moved:
        evidence = f"predicting changed the state {base.moved} times, before the token was paid"
        return _finding("dynamic-state", "violates", evidence)
    return _finding("dynamic-state", "clean", "the state's hash is the same before and after every prediction")


def _probe(ask: Ask, source: TextOf, base: Heard, flips: int, told: Told) -> Finding:
    """Fresh runs: with the same text, and with one token changed. What was said up to the change must not move."""
    turn = np.empty(len(base.rows), np.int64)
    turn[base.order] = np.arange(len(base.order))
    text = source(base.vocab)
    try:
        again = ask("plain", source)
        moved = _moved(base, again)
        if moved.any():
            evidence = (
                f"the same text gives other distributions in a second run, from position {int(moved.argmax())} on"
            )
            return _finding("dynamic-probe", "violates", evidence)
        for number, token in enumerate(_places(base, flips), 1):
            other = text.copy()
            other[token] = (other[token] + 1) % base.vocab
            heard = ask("plain", lambda vocab, other=other: other)  # type: ignore[misc]
            told(1 + number)
            earlier = turn <= turn[token - 1]
            wrong = np.flatnonzero(_moved(base, heard) & earlier)
            if len(wrong):
                evidence = (
                    f"token {token} was changed, and {len(wrong)} distributions moved that were due before, "
                    f"position {wrong[0]} first"
                )
                return _finding("dynamic-probe", "violates", evidence)
    except (Failed, HonestyError) as error:
        return _finding("dynamic-probe", "violates", f"on a changed text it does not come to the end: {error}")
    return _finding("dynamic-probe", "clean", f"{flips} changed tokens moved nothing that was due before them")


def _places(base: Heard, flips: int) -> list[int]:
    """Tokens to change: the last one, where leaks of a whole text show, and others spread over the text."""
    last = len(base.rows)
    return sorted({last, *(int(each) for each in np.linspace(2, last - 1, max(flips - 1, 1)))})[-flips:]


def _moved(base: Heard, other: Heard) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = (base.rows == other.rows).all(axis=1)
    return ~same


def _steps(ask: Ask, source: TextOf, base: Heard) -> tuple[Heard | None, Finding]:
    """The same text one step at a time, nothing told ahead."""
    try:
        stepped = ask("steps", source)
    except (Failed, HonestyError) as error:
        return None, _finding("dynamic-steps", "violates", f"one step at a time it does not come to the end: {error}")
    apart = np.abs(stepped.rows - base.rows).max(axis=1)
    place = int(apart.argmax())
    if apart[place] > APART:
        evidence = f"at position {place} the scored distribution and a decoder's are {apart[place]:.3g} nats apart"
        return stepped, _finding("dynamic-steps", "violates", evidence)
    return stepped, _finding(
        "dynamic-steps", "clean", f"whole units and single steps agree within {apart[place]:.1e} nats"
    )


def _decode(ask: Ask, source: TextOf, stepped: Heard | None) -> Finding:
    """Writes the text with the distributions, and lets a fresh process read it back."""
    if stepped is None or stepped.ahead:
        why = "it offers no steps: a unit's tokens must be told before it is predicted, and a decoder has none of them"
        return _finding("dynamic-decode", "cannot tell", why)
    text = source(stepped.vocab)
    words = _written(stepped, text)
    decoder: Any = _decoder(words)
    try:
        ask("steps", lambda vocab: np.zeros_like(text), lambda positions, rows: decoder.decode(_counts(rows)))
    except ArtifactError:
        return _finding(
            "dynamic-decode", "violates", "a fresh process cannot read the file that its own distributions wrote"
        )
    except (Failed, HonestyError) as error:
        return _finding("dynamic-decode", "violates", f"decoding does not come to the end: {error}")
    return _compared(stepped, text, words, decoder)


class _Reading:
    """A decoder that keeps what it has read."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.symbols: list[int] = []

    def decode(self, counts: Any) -> Ints:
        found: Ints = self.inner.decode(counts)
        self.symbols += found.tolist()
        return found


def _decoder(words: bytes) -> _Reading:
    from fairway.score import range_coder

    return _Reading(range_coder.decoder(words))


def _compared(stepped: Heard, text: Ints, words: bytes, decoder: _Reading) -> Finding:
    wanted = text[np.array(stepped.order) + 1]
    wrong = np.flatnonzero(wanted != np.array(decoder.symbols))
    if len(wrong):
        evidence = f"the text read back from {len(words)} bytes differs from its {int(wrong[0]) + 1}th token on"
        return _finding("dynamic-decode", "violates", evidence)
    bits = 8 * len(words) / len(wanted)
    size = f"{len(words)} bytes ({bits:.3f} bits each)"
    evidence = f"{len(wanted)} tokens were written in {size} and read back by a fresh process"
    return _finding("dynamic-decode", "clean", evidence)


def _written(stepped: Heard, text: Ints) -> bytes:
    from fairway.score import range_coder

    coder = range_coder.encoder()
    for position in stepped.order:
        counts = _counts(stepped.rows[position : position + 1])
        left, count = range_coder.intervals(counts, text[position + 1 : position + 2])
        coder.encode(left, count)
    return coder.finish()


def _counts(rows: npt.NDArray[np.float64]) -> Any:
    import torch

    from fairway.score import exact

    return exact.counts(exact.grid(torch.from_numpy(np.maximum(rows, -1e6))))


def _report(name: str, findings: list[Finding], facts: dict[str, Any]) -> Report:
    return Report(name, tuple(findings), facts)
