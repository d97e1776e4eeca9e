"""A loop over rounds * n places that takes each place modulo n goes over the same tokens again."""

import pytest

from tests.audit.order import HEAD, broken, doubted

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
