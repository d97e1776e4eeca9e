"""A loop that guesses each token of a text in turn: whether what it hands out knows the token."""

import ast
from pathlib import Path

import pytest

from fairway.audit.reading.guesses import answers
from tests.audit.order import line_of
from tests.audit.small import script, verdict

GUESS = """
@njit(cache=True)
def guess(tokens, start, stop, opens, held, votes, hint, gain):
    key = 7
    for t in range(start, stop):
        slot = int(tokens[t - 1]) * 31 % 4093
        NOW
        best, most = -1, 0.0
        for e in range(2):
            if votes[e, slot] < 2:
                continue
            GATE
            if votes[e, slot] > most:
                best, most = held[e, slot], float(votes[e, slot])
        HAND
        token = int(tokens[t])
        for e in range(2):
            learn(held[e], votes[e], slot, token)
"""
HAND = "hint[t] = best\n        gain[t] = 0.5 * most"
HONEST = {
    "nothing of the token": ("now = 0", "pass", HAND),
    "the token before": ("now = opens[int(tokens[t - 1])]", "if now and e == 1:\n                continue", HAND),
    "read, and used by nothing": ("now = opens[int(tokens[t])]", "pass", HAND),
    "whether the guess is right": (
        "now = 0",
        "pass",
        f"{HAND}\n        gain[t] = gain[t] if best == tokens[t] else 0.0",
    ),
    "what the token opens, for the next": ("now = 0", "pass", f"{HAND}\n        starts[t] = opens[int(tokens[t])]"),
}
FAULTS = {
    "an expert is passed over": ("now = opens[int(tokens[t])]", "if now and e == 1:\n                continue", HAND),
    "a weight": ("now = 0.3 if opens[int(tokens[t])] else 1.0", "pass", HAND.replace("0.5", "now")),
    "a hint that is kept back": (
        "now = 0",
        "pass",
        f"if not opens[int(tokens[t])]:\n            {HAND.replace('        ', '            ')}",
    ),
    "a token further": ("now = opens[int(tokens[t + 1])]", "pass", HAND.replace("0.5", "now")),
}


def kernel(now: str, gate: str, hand: str) -> str:
    return GUESS.replace("NOW", now).replace("GATE", gate).replace("HAND", hand)


@pytest.mark.parametrize("name", HONEST)
def test_a_guess_of_what_came_before_knows_nothing(name: str) -> None:
    assert list(answers(ast.parse(kernel(*HONEST[name])))) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_guess_that_hangs_on_its_token_is_told_where_that_is_read(name: str) -> None:
    text = kernel(*FAULTS[name])
    found = set(answers(ast.parse(text)))
    assert {each.line for each in found} == {line_of(text, "opens[int(tokens[t")}
    assert {each.stored for each in found} <= {line_of(text, "hint[t] = best"), line_of(text, "gain[t] = ")}


FIRST = """
def follow(tokens, low, high, opens, held, slots, hint):
    for i in range(low, high):
        learn(held, slots[0], tokens[i])
        slots[0] = int(tokens[i]) * 31 % 4093
        best = held[slots[0]]
        if ASKED:
            best = -1
        hint[i - low] = best
"""


@pytest.mark.parametrize(("asked", "known"), [("opens[tokens[i]]", False), ("opens[tokens[i + 1]]", True)])
def test_what_is_learned_before_the_guess_may_be_known(asked: str, known: bool) -> None:
    """Here each turn begins with the token that the last one guessed, and guesses the next."""
    text = FIRST.replace("ASKED", asked)
    assert [each.line for each in answers(ast.parse(text))] == [line_of(text, asked)] * known


TRUSTED = """
def follow(tokens, n):
    for i in range(1, n):
        key = (tokens[i - 1], tokens[i])
        seen = best.get(key, (-1, 0))
        hints[i] = seen[0]
        BEFORE
        follower = tokens[i + 1]
        counts[key, follower] = counts.get((key, follower), 0) + 1
        if counts[key, follower] >= seen[1]:
            best[key] = (follower, counts[key, follower])
        AFTER
"""


@pytest.mark.parametrize(
    ("before", "after", "known"),
    [
        ("trust[i] = seen[1] / 8", "pass", False),
        ("pass", "trust[i] = seen[1] / 8", False),
        ("pass", "trust[i] = best[key][1] / 8", True),
        ("pass", "trust[i + 1] = best[key][1] / 8", False),
    ],
)
def test_what_is_said_of_a_place_once_its_token_was_learned_knows_it(before: str, after: str, known: bool) -> None:
    """The hint of the same place was handed out before; of the next place what was learned may be said."""
    text = TRUSTED.replace("BEFORE", before).replace("AFTER", after)
    wanted = [line_of(text, "best[key][1] / 8")] if known else []
    assert [each.stored for each in answers(ast.parse(text))] == wanted


@pytest.mark.parametrize(
    "turn",
    [
        "pairs[tokens[t - 1], tokens[t]] += 1\n        price[t] = pairs[tokens[t - 1], tokens[t]]",
        "a, b = tokens[t - 1], tokens[t]\n        price[t] = pairs[a, b] / seen[a]\n        pairs[a, b] += 1",
        "ring[t % 8] = tokens[t]\n        keys[t] = ring[(t - 3) % 8] * 31 + tokens[t]",
    ],
    ids=["counts", "a price", "keys"],
)
def test_counts_prices_and_keys_are_no_guesses(turn: str) -> None:
    assert list(answers(ast.parse(f"def walk(tokens, n):\n    for t in range(1, n):\n        {turn}\n"))) == []


def test_loops_in_loops_take_no_time() -> None:
    """Twice for each of sixty levels would be for ever."""
    lines = [f"{'    ' * n}for a{n} in range(9):" for n in range(60)]
    text = "\n".join([*lines, "    " * 60 + "held[a0] = tokens[a1]"])
    assert list(answers(ast.parse(text))) == []


LOSS = """
        guess(tokens, at + 1, at + 1 + len(y), lead, held, votes, hints, gains)
        log_p = torch.log_softmax(net(torch.from_numpy(x)).float(), -1)
        hint, gain = (torch.from_numpy(each[at + 1 : at + 1 + len(y)]) for each in (hints, gains))
        p_hint = log_p.gather(-1, hint.clamp_min(0)[:, None])[:, 0].exp()
        own = log_p.gather(-1, torch.from_numpy(y)[:, None])[:, 0]
        nll = -(own + gain * (hint == torch.from_numpy(y)) - torch.log1p(p_hint * torch.expm1(gain)))
"""
STATE = (
    "held, votes = np.zeros((2, 4093), np.int64), np.zeros((2, 4093), np.int64); "
    "hints, gains = np.full(len(tokens) + 1, -1), np.zeros(len(tokens) + 1)"
)
LEARN = "def learn(held, votes, slot, token):\n    held[slot] = token\n    votes[slot] += 1\n"


@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize(("forms", "name"), [(HONEST, "the token before"), (FAULTS, "an expert is passed over")])
def test_a_score_that_such_guesses_come_to_reads_its_target(
    tmp_path: Path, forms: dict[str, tuple[str, str, str]], name: str, used: bool
) -> None:
    """Where no score comes of them, nothing is said."""
    extra = "from numba import njit\n" + LEARN + kernel(*forms[name])
    found = verdict(
        tmp_path, "target_gated_tilt", script(loss=LOSS, state=STATE, extra=extra) if used else script(extra=extra)
    )
    assert found.verdict == ("violates" if used and forms is FAULTS else "clean")
