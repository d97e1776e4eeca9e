"""A loop over rounds * n places that takes each place modulo n goes over the same tokens again."""

import pytest

from tests.audit.order import HEAD, MAIN, broken, doubted, line_of, trace_of

WALK = """
def walk(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    n = (val.numel() - 1) // 32768
    total, count, rounds = 0.0, 0, args.epochs
    chunks = [[] for _ in range(n)]
    for w in range(0, val.numel() - 1, 1024):
        chunks[min(w // 32768, n - 1)].append(w)
    for k in range(END):
        PLACE
        TOTAL
        mine = chunks[ci]
        with torch.no_grad():
            for b in range(0, len(mine), 32):
                for w in mine[b : b + 32]:
                    piece = val[w : w + 1025]
                    total += model(piece[:-1], piece[1:]).item() * 1024
                    count += 1024
        piece = val[ci * 32768 : (ci + 1) * 32768 + 1]
        opt.zero_grad()
        model(piece[:-1], piece[1:]).backward()
        opt.step()
    return total / count

if __name__ == "__main__":
    args = Hyperparameters()
    model = GPT()
    train(args, model)
    final = walk(args, model, load(args.val_files))
    print("final val_loss", final, "val_bpb", final / math.log(2) / 2.4)
"""
AGAIN = {"multi-epoch-last", "rescoring-after-adaptation"}


def script(end: str, place: str, total: str = "pass") -> str:
    return HEAD + WALK.replace("END", end).replace("PLACE", place).replace("TOTAL", total)


@pytest.mark.parametrize(
    ("end", "place"),
    [
        ("n * rounds", "ci = k % n"),
        ("rounds * n", "ci = k % n"),
        ("args.epochs * len(chunks)", "ci = k % len(chunks)"),
        ("n * rounds", "sweep, ci = divmod(k, n)"),
    ],
)
@pytest.mark.parametrize("total", ["pass", "if ci == 0: total, count = 0.0, 0"])
def test_places_modulo_their_number_come_again_in_each_round(end: str, place: str, total: str) -> None:
    assert broken(script(end, place, total)) & AGAIN


@pytest.mark.parametrize(
    ("end", "place"),
    [
        ("n", "ci = k"),
        ("n", "ci = (k + args.epochs) % n"),  # each place once, from another beginning
        ("n // 4 * 4", "ci = k // 4 * 4 + k % 4"),
    ],
)
def test_each_place_once_is_one_pass(end: str, place: str) -> None:
    assert not doubted(script(end, place)) & AGAIN


SWEEP = """
import torch.distributed as dist
rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

def sweep(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    n = (val.numel() - 1) // 32768
    sums = torch.zeros(2, dtype=torch.float64)
    chunks = [[] for _ in range(n)]
    for w in range(0, val.numel() - 1, 1024):
        chunks[min(w // 32768, n - 1)].append(w)
    for TURN:
        AGAIN
        lo, hi = (len(mine) * rank) // world, (len(mine) * (rank + 1)) // world
        with torch.no_grad():
            for k in range(lo, hi, 8):
                for w in mine[k : k + 8]:
                    piece = val[w : w + 1025]
                    sums[0] += model(piece[:-1], piece[1:]).item() * 1024
                    sums[1] += 1024
        piece = val[ci * 32768 : (ci + 1) * 32768 + 1]
        opt.zero_grad()
        model(piece[:-1], piece[1:]).backward()
        opt.step()
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()
"""
TWICE = "_, (ci, mine) in ((e, item) for e in range(args.epochs) for item in enumerate(chunks))"


def swept(turn: str, again: str) -> str:
    call = "    final = report(lambda: sweep(args, model, val))\n"
    report = "def report(score):\n    return score()\n"
    text = HEAD + SWEEP.replace("TURN", turn).replace("AGAIN", again) + report
    return text + MAIN.replace("    final = eval_ttt(args, model, val)\n", call)


@pytest.mark.parametrize(
    ("turn", "again", "wanted"),
    [
        ("ci, mine in enumerate(chunks)", "", set()),
        (TWICE, "if ci == 0: sums = torch.zeros(2, dtype=torch.float64)", {"multi-epoch-last"}),
    ],
    ids=["once", "each epoch anew"],
)
def test_shares_of_lists_that_were_filled_in_a_loop_of_their_own_are_scored(
    turn: str, again: str, wanted: set[str]
) -> None:
    """Of a list that has one element to the walk an eighth is none. The sweep is called by a lambda, whose line is the
    trial's and the walk's alike."""
    text = swept(turn, again)
    scored = {place.line for score in trace_of(text).scores for place in score.stack}
    assert line_of(text, "sums[0] += model(") in scored
    assert broken(text) == wanted
