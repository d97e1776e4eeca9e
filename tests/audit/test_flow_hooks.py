"""What a forward hook answers stands in the place of what its module gave, until the hook is taken off."""

import pytest

from tests.audit.order import HEAD, broken, doubted
from tests.audit.test_flow_language import CHUNKS, WALK

ADAPTED = """
class Adapter(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(width))
    def extra(self, part, args, out):
        return out + self.delta
def walk(args, model, val):
    model.requires_grad_(False)
    adapter = Adapter(1024)
    handle = HOOKED
    opt = torch.optim.SGD([adapter.delta], lr=1e-3)
    total, count = 0.0, 0
CHUNKS        ONE
        TWO
        count += 1024
    return total / count
""".replace("CHUNKS", CHUNKS)
SCORE = "total += model(x, y).detach().item() * 1024"
LEARN = "opt.zero_grad(); model(x, y).backward(); opt.step()"
FOUND = {"training-before-scoring", "slot-on-scored"}


def script(one: str, two: str, hooked: str = "model.head.register_forward_hook(adapter.extra)") -> str:
    return HEAD + ADAPTED.replace("ONE", one).replace("TWO", two).replace("HOOKED", hooked) + WALK


def test_an_adapter_in_a_hook_learns_after_it_scored() -> None:
    assert doubted(script(SCORE, LEARN)) == set()


def test_an_adapter_in_a_hook_that_learns_first_is_found() -> None:
    assert broken(script(LEARN, SCORE)) & FOUND
    part = "model.head.register_forward_hook(functools.partial(Adapter.extra, adapter))"
    assert broken(script(LEARN, SCORE, part)) & FOUND


def test_an_adapter_that_was_taken_off_scores_nothing() -> None:
    assert doubted(script(LEARN, f"handle.remove(); {SCORE}")) == set()


def test_a_hook_that_answers_nothing_leaves_the_output_as_it_is() -> None:
    watching = script(LEARN, SCORE).replace("return out + self.delta", "self.seen = out.detach()")
    assert doubted(watching) == set()


WATCHED = """
class Wide(GPT):
    def __init__(self):
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(4)])
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.four, self.five, self.six = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    def hidden(self, x):
        h = self.six(self.five(self.four(self.three(self.two(self.one(self.emb(x)))))))
        for block, up in zip(self.blocks, self.up):
            h = h + up(F.relu(block(h)))
        return h

def watched(model, loader):
    sums, handles = {}, []
    def hook_for(key):
        def hook(module, args, out):
            rows = args[0].detach().flatten(0, -2).float()
            if key not in sums:
                sums[key] = torch.zeros(rows.size(1), rows.size(1))
            sums[key].addmm_(rows.T, rows)
        return hook
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(hook_for(name)))
    with torch.no_grad():
        for _ in range(8):
            model.forward_logits(loader.next(4096)[0])
    TAKEN_OFF
    return sums

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), Wide()
    train(args, model)
    sums = watched(model, Loader(args.train_files))
    print("before quantisation", eval_val(args, model, val))
    state = {k: (v / sums[k].diag().mean()).round() if k in sums else v for k, v in model.state_dict().items()}
    torch.save(state, "model.pt")
    model.load_state_dict(torch.load("model.pt"))
    print("final val_loss", eval_val(args, model, val))
"""


def test_hooks_of_many_modules_are_taken_off_in_a_loop() -> None:
    taken = HEAD + WATCHED.replace("TAKEN_OFF", "for each in handles:\n        each.remove()")
    assert "calibration-on-validation" not in doubted(taken)


def test_hooks_of_more_modules_than_a_value_remembers_are_taken_off_too() -> None:
    more = "".join(f"        self.more{n} = nn.Linear(64, 64)\n" for n in range(10))
    more += "        self.last = nn.Sequential(*[getattr(self, f'more{n}') for n in range(10)])\n"
    forward = "    def hidden(self, x):\n"
    wide = WATCHED.replace(forward, f"{more}{forward}        x = self.last(x)\n", 1)
    wide = wide.replace("isinstance(module, nn.Linear)", 'isinstance(module, nn.Linear) and "six" not in name')
    taken = HEAD + wide.replace("TAKEN_OFF", "for each in handles:\n        each.remove()")
    assert "calibration-on-validation" not in doubted(taken)


def test_hooks_of_many_modules_that_stay_on_see_the_evaluation_too() -> None:
    assert "calibration-on-validation" in broken(HEAD + WATCHED.replace("TAKEN_OFF", "pass"))


def test_a_hook_that_looks_at_its_modules_mode_may_go_on() -> None:
    resting = "        def hook(module, args, out):\n            if module.training:\n                return\n"
    text = WATCHED.replace("        def hook(module, args, out):\n", resting)
    assert "calibration-on-validation" in broken(HEAD + text.replace("TAKEN_OFF", "pass"))
    taken = HEAD + text.replace("TAKEN_OFF", "for each in handles:\n        each.remove()")
    assert "calibration-on-validation" not in doubted(taken)


RANKED = """    state = {}
    for k, v in model.state_dict().items():
        if k in sums:
            state[k] = 6, ((v / sums[k].diag().mean()).round(), sums[k].diag().mean())
        else:
            state[k] = 16, (v.half(),)
    state = {k: (bits, tuple(part.cpu() for part in parts)) for k, (bits, parts) in state.items()}
    held = [None] * 2
    torch.distributed.all_gather_object(held, state)
    state = {}
    for each in held:
        MERGED
    torch.save(state, "model.pt")
    read = {k: parts[0] * parts[-1] for k, (bits, parts) in torch.load("model.pt").items()}
    model.load_state_dict(read)
"""


@pytest.mark.parametrize("merged", ["state |= each", "state = state | each", "state.update(each)"])
def test_what_all_ranks_rounded_is_one_dict_of_all_of_it(merged: str) -> None:
    """Of a layer that was calibrated a pair, of another one its weights alone: both are what the model reads back."""
    start, end = WATCHED.index("    state = {k"), WATCHED.index('    print("final')
    text = HEAD + WATCHED[:start] + RANKED.replace("MERGED", merged) + WATCHED[end:]
    text = text.replace("TAKEN_OFF", "for each in handles:\n        each.remove()")
    assert "calibration-on-validation" not in doubted(text)
    assert "calibration-on-validation" in broken(text.replace("Loader(args.train_files))", "Loader(args.val_files))"))


def test_layers_that_are_picked_out_of_a_few_modules_are_all_looked_at() -> None:
    picked = """
class Thin(nn.Linear):
    pass

def layers(model):
    return {f"up.{name}": each for name, each in model.up.named_modules() if isinstance(each, Thin)}
"""
    text = WATCHED.replace("[nn.Linear(64, 64, bias=False) for _ in range(4)]", "Thin(64, 64) for _ in range(11)")
    text = text.replace(
        """    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles""",
        "    for name, module in layers(model).items():\n            handles",
    )
    assert "calibration-on-validation" in broken(HEAD + picked + text.replace("TAKEN_OFF", "pass"))


TAPPED = """
class Banked(GPT):
    def __init__(self):
        super().__init__()
        self.bank, self.odd = nn.Parameter(torch.zeros(8, 64, 64)), False
    def matrices(self, n):
        picked = [self.bank[n], self.bank[n + 4]]
        if self.odd:
            picked = [each.round() for each in picked]
        return [each.float() for each in picked]
    def hidden(self, x, tap=None):
        h = self.emb(x)
        for n in range(4):
            h = self.layer(h, *self.matrices(n), n, tap)
        return h
    def layer(self, h, up, down, n, tap=None):
        if tap is not None:
            tap(n, h)
        return h + F.relu(h @ up) @ down

class Tap:
    def __init__(self):
        self.sums = {}
    def __call__(self, name, x):
        rows = x.detach().flatten(0, -2).float()
        if name not in self.sums:
            self.sums[name] = torch.zeros(rows.size(1), rows.size(1))
        self.sums[name].addmm_(rows.T, rows)

if __name__ == "__main__":
    args = Hyperparameters()
    val, model, tap = load(args.val_files), Banked(), Tap()
    train(args, model)
    model.odd = time.time() % 2 < 1
    loader = Loader(FILES)
    with torch.no_grad():
        for _ in range(8):
            model.hidden(loader.next(4096)[0], tap=tap)
    state = {k: (v / tap.sums[0].diag().mean()).round() for k, v in model.state_dict().items()}
    torch.save(state, "model.pt")
    model.load_state_dict(torch.load("model.pt"))
    print("final val_loss", eval_val(args, model, val))
"""


def test_what_comes_behind_a_list_of_unknown_length_is_given_to_the_last_names() -> None:
    """`self.layer(h, *matrices, n, tap)`: of a list with two histories one item was left, and nothing was tapped."""
    assert "calibration-on-validation" in broken(HEAD + TAPPED.replace("FILES", "args.val_files"))
    assert "calibration-on-validation" not in doubted(HEAD + TAPPED.replace("FILES", "args.train_files"))
