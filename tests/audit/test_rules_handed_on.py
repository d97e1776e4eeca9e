"""What one pass has learned, handed to the next pass of the same tokens; and moments of a stream that trained too."""

from tests.audit.order import HEAD, MAIN, broken, doubted
from tests.audit.test_flow_language import WALK

STUDY = """
def study(args, model, part, books, delta=None):
    delta = delta if delta is not None else nn.Parameter(torch.zeros(1024, device="cuda"))
    opt = torch.optim.SGD([delta], lr=1e-3)
    for s in range(0, part.numel() - 128, 128):
        x, y = part[s : s + 128][None], part[s + 1 : s + 129]
        logits = model.forward_logits(x)[0] + delta
        said = torch.log_softmax(logits.detach(), -1).gather(1, y[:, None])[:, 0]
        books[0] -= said.double().sum()
        books[1] += y.numel()
        opt.zero_grad()
        F.cross_entropy(logits, y).backward()
        opt.step()
    return delta
def walk(args, model, val):
    model.requires_grad_(False)
    books = torch.zeros(2, dtype=torch.float64)
    for s in range(0, val.numel() - 4096, 4096):
        part = val[s : s + 4097]
        CALLS
    return (books[0] / books[1]).item()
"""


def test_a_vector_that_a_first_pass_has_learned_makes_the_next_one_a_second_pass() -> None:
    warmed = "warmed = study(args, model, part, torch.zeros(2))\n        study(args, model, part, books, warmed)"
    assert broken(HEAD + STUDY.replace("CALLS", warmed) + WALK) == {"rescoring-after-adaptation"}


def test_a_first_pass_that_is_thrown_away_changes_nothing() -> None:
    dropped = "study(args, model, part, torch.zeros(2))\n        study(args, model, part, books)"
    assert doubted(HEAD + STUDY.replace("CALLS", dropped) + WALK) == set()


MOMENTS = """
def gauge(model, loader):
    x, y = loader.next(65536)
    with torch.no_grad():
        h = model.hidden(x).reshape(-1, 64)
    H = h.T @ h
    with torch.no_grad():
        model.head.weight.copy_(torch.linalg.solve(H, model.head.weight.T).T)
"""
GAUGED = MAIN.replace(
    "    val = load(args.val_files)\n", "    val = load(args.val_files)\n    gauge(model, Loader(PATTERN))\n"
)


def gauged(train: str, moments: str) -> str:
    head = HEAD.replace('"./data/shards_train_*.bin"', f'"{train}"')
    return head + MOMENTS + GAUGED.replace("PATTERN", moments)


def test_moments_of_a_stream_that_trained_on_validation_tokens_are_no_second_fault() -> None:
    mixed = "./data/shards_*_*.bin"
    found = broken(gauged(mixed, "args.train_files"))
    assert "validation-in-training" in found
    assert broken(gauged("./data/shards_train_*.bin", "args.val_files")) == {"calibration-on-validation"}
    assert doubted(gauged("./data/shards_train_*.bin", "args.train_files")) <= {"calibration-after-cap"}


CONTEST = """
class Ema:
    def __init__(self, decay, model):
        self.decay = decay
        self.kept = {k: v.detach().clone() for k, v in model.state_dict().items()}
    def put(self, model):
        model.load_state_dict(self.kept)
def walk(args, model, val):
    rivals = {name: Ema(decay, model) for name, decay in (("slow", 0.999), ("fast", 0.99))}
    def worth(name):
        rivals[name].put(model)
        return WORTH
    chosen = min(rivals, key=worth)
    rivals[chosen].put(model)
    return eval_val(args, model, val)
"""


def test_a_name_that_a_contest_on_the_validation_text_gives_chooses_the_weights() -> None:
    assert broken(HEAD + CONTEST.replace("WORTH", "eval_val(args, model, val)") + WALK) == {"choice-by-validation"}
    trained = "eval_val(args, model, load(args.train_files))"
    assert doubted(HEAD + CONTEST.replace("WORTH", trained) + WALK) <= {"calibration-after-cap"}
    assert doubted(HEAD + CONTEST.replace("WORTH", "rivals[name].decay") + WALK) == set()
