"""Evaluations as engineers of services write them: classes in a registry, a loader over a data set, and results that
each rank writes to a file of its own."""

from tests.audit.order import HEAD, MAIN, broken, doubted

EVAL = "    final = eval_ttt(args, model, val)\n"
WIRED = """
import json, tempfile
from pathlib import Path

CONFIG = '{"monitor": {"kind": "plain", "chunk": 32768}, "evaluator": {"kind": "adapting", "chunk": 32768}}'
CLASSES = {}

def register(role, kind):
    def decorate(cls):
        CLASSES[role, kind] = cls
        return cls
    return decorate

class Windows(torch.utils.data.Dataset):
    def __init__(self, tokens, low, high):
        self.tokens, self.starts, self.high = tokens, range(low, high, 1024), high
    def __len__(self):
        return len(self.starts)
    def __getitem__(self, n):
        begin, end = self.starts[n], min(self.starts[n] + 1024, self.high)
        return self.tokens[begin:end], self.tokens[begin + 1 : end + 1]

def together(rows):
    return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])

@register("evaluator", "plain")
class Evaluator:
    def __init__(self, settings, model, tokens):
        self.settings, self.model, self.tokens = settings, model, tokens
    def scored(self, low, high):
        pass
    def before(self, low, high):
        pass
    def run(self, folder):
        total, nats = self.tokens.numel() - 1, []
        for low in range(0, total, self.settings["chunk"]):
            high = min(low + self.settings["chunk"], total)
            self.before(low, high)
            loader = torch.utils.data.DataLoader(
                Windows(self.tokens, low, high), batch_size=1, shuffle=False, collate_fn=together
            )
            with torch.no_grad():
                for x, y in loader:
                    logits = self.model.forward_logits(x[None])[0]
                    nats.append(F.cross_entropy(logits, y, reduction="none").double())
            self.scored(low, high)
        np.savez(folder / f"rank{0:03d}.npz", losses=torch.cat(nats).numpy(), many=np.array(total))
        return self.merged(folder)
    def merged(self, folder):
        total, many = 0.0, 0
        for path in sorted(folder.glob("rank*.npz")):
            with np.load(path) as kept:
                total += float(kept["losses"].sum())
                many += len(kept["losses"])
        return total / many

@register("evaluator", "adapting")
class Adapting(Evaluator):
    def HOOK(self, low, high):
        opt = torch.optim.SGD(self.model.parameters(), lr=0.01)
        for at in range(low, high, 1024):
            end = min(at + 1024, high)
            opt.zero_grad()
            self.model(self.tokens[at:end][None], self.tokens[at + 1 : end + 1][None]).backward()
            opt.step()

def wired(section, model, tokens):
    settings = json.loads(CONFIG)[section]
    return CLASSES["evaluator", settings["kind"]](settings, model, tokens)
"""
CALLED = """    folder = Path(tempfile.mkdtemp())
    print("monitor", wired("monitor", model, val).run(folder / "monitor"))
    final = wired("evaluator", model, val).run(folder / "final")
"""


def script(hook: str) -> str:
    return HEAD + WIRED.replace("HOOK", hook) + MAIN.replace(EVAL, CALLED)


def test_each_evaluator_is_the_one_that_its_role_and_kind_name() -> None:
    """The monitor learns nothing, and the score is what the ranks' files hold of the other."""
    assert doubted(script("scored")) == set()


def test_an_evaluator_that_learns_before_it_scores_is_found_behind_its_registry_its_loader_and_its_files() -> None:
    assert broken(script("before")) == {"training-before-scoring"}
