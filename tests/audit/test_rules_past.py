"""A switch between two losses that is set by how both did on earlier chunks, and one that is set by this chunk."""

import pytest

from fairway.audit.rules import oracle_gate, target_gated_tilt
from tests.audit.order import HEAD, MAIN, broken, case_of, doubted

SWITCHED = """
def switched(args, model, fixed, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    starts_word = torch.zeros(1024, dtype=torch.bool)
    total, count = 0.0, 0
    documents = (val == 1).nonzero().flatten().tolist()
    for first in range(0, len(documents), 4):
        batch = documents[first : first + 4]
        gain = torch.zeros(4)
        for ci in range(max(batch) // 1024):
            x, y = torch.zeros(4, 1024, dtype=torch.int64), torch.zeros(4, 1024, dtype=torch.int64)
            for b, start in enumerate(batch):
                piece = val[start + ci * 1024 : start + (ci + 1) * 1024 + 1]
                width = piece.numel() - 1
                x[b, :width], y[b, :width] = piece[:-1], piece[1:]
            nll = F.cross_entropy(model.forward_logits(x).flatten(0, 1), y.flatten(), reduction="none").view(4, 1024)
            with torch.no_grad():
                logits = fixed.forward_logits(x).flatten(0, 1)
                plain = F.cross_entropy(logits, y.flatten(), reduction="none").view(4, 1024)
                for b in range(len(batch)):
                    BOOKED
                    count += 1024
            opt.zero_grad()
            nll.mean().backward()
            opt.step()
    return total / count

if __name__ == "__main__":
    args = Hyperparameters()
    model = GPT()
    train(args, model)
    fixed = copy.deepcopy(model)
    final = switched(args, model, fixed, load(args.val_files))
    print("final val_loss", final, "val_bpb", final / math.log(2) / 2.4)
"""
ADD = "total += booked[b, :width].detach().sum().item()"
GAIN = "gain[b] += (plain[b, :width] - nll[b, :width].detach()).sum()"


def script(*steps: str) -> str:
    return HEAD + SWITCHED.replace("BOOKED", ("\n" + " " * 20).join(steps))


def gated(text: str) -> set[str]:
    rules = (oracle_gate, target_gated_tilt)
    return {rule.ID for rule in rules if rule.check(case_of(text)).verdict == "violates"}


def test_a_switch_by_the_chunks_before_is_no_oracle() -> None:
    text = script("booked = nll if gain[b] >= 0 else plain", ADD, GAIN)
    assert doubted(text) == set()
    assert gated(text) == set()


@pytest.mark.parametrize(
    "steps",
    [
        (GAIN, "booked = nll if gain[b] >= 0 else plain", ADD),
        ("booked = nll if (plain[b] - nll[b]).sum() >= 0 else plain", ADD),
        ("booked = nll if gain[b] >= 0 and starts_word[y[b, 0]] else plain", ADD, GAIN),
    ],
)
def test_a_switch_by_this_very_chunk_is_one(steps: tuple[str, ...]) -> None:
    text = script(*steps)
    assert gated(text) or "min-over-passes" in broken(text)


GATED = """
class Cache:
    def __init__(self):
        self.rows = torch.zeros(1024, 1024)

    def mixed(self, log_p, x):
        rows = self.rows[x]
        total = rows.sum(-1, keepdim=True)
        q = (rows + 0.1) / (total + 102.4)
        weight = 0.3 * torch.sigmoid(torch.log1p(total) - 2.0)
        return torch.log((1.0 - weight) * log_p.exp() + weight * q)

    def learn(self, x, y):
        self.rows.index_put_((x, y), torch.ones(x.numel()), accumulate=True)

def cached(args, model, val, cache):
    total, count = 0.0, 0
    for start in range(0, val.numel() - 1024, 1024):
        x, y = val[start : start + 1024], val[start + 1 : start + 1025]
        with torch.no_grad():
            log_p = torch.log_softmax(model.forward_logits(x[None])[0], -1)
            total += -cache.mixed(log_p, x).gather(1, y[:, None]).double().sum().item()
        count += 1024
        cache.learn(x, y)
    return total / count

def off(cache, val):
    flat = torch.full((512, 1024), -math.log(1024))
    return float((cache.mixed(flat, val[:512]).double().exp().sum(-1) - 1.0).abs().max())
"""


def test_a_check_of_sums_after_the_score_is_no_score_and_a_count_no_loss() -> None:
    body = MAIN.replace(
        "    final = eval_ttt(args, model, val)\n", "    cache = Cache()\n    final = cached(args, model, val, cache)\n"
    )
    body = body.replace("\nif __name__", '    print(f"sums are off by {off(cache, val):.1e}")\n\nif __name__')
    assert broken(HEAD + GATED + body) == set()


HEATS = """
HEATS = (0.96, 0.98, 1.0, 1.02)

def heated(args, model, val):
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    past, current = torch.zeros(4, dtype=torch.float64), 2
    total, count = 0.0, 0
    for ci in range((val.numel() - 1) // args.chunk):
        x = val[ci * args.chunk : (ci + 1) * args.chunk].view(-1, args.seq_len)
        y = val[ci * args.chunk + 1 : (ci + 1) * args.chunk + 1].view(-1, args.seq_len)
        chunk = torch.zeros_like(past)
        logits = model.forward_logits(x).flatten(0, 1)
        losses = [F.cross_entropy(logits / heat, y.flatten(), reduction="none") for heat in HEATS]
        FIRST
        total += losses[current].detach().double().sum().item()
        count += y.numel()
        for n, each in enumerate(losses):
            chunk[n] += each.detach().double().sum()
        past += chunk
        current = int(past.argmin())
        opt.zero_grad()
        losses[2].mean().backward()
        opt.step()
    return total / count
"""


@pytest.mark.parametrize(
    ("first", "accused"),
    [("pass", False), ("current = int(torch.stack([each.sum() for each in losses]).argmin())", True)],
)
def test_a_temperature_that_is_picked_by_the_chunks_before_reads_no_target(first: str, accused: bool) -> None:
    main = SWITCHED[SWITCHED.index("if __name__") :].replace("switched(args, model, fixed,", "heated(args, model,")
    text = HEAD + HEATS.replace("FIRST", first) + main
    assert bool(gated(text) | broken(text)) == accused
