"""Scripts that are written for few bytes: settings in a text, conditions as `and`, the score said by the last pass."""
# ruff: noqa: E501 (examples are texts of scripts)

from pathlib import Path

import pytest

from fairway.audit.settings import is_setting
from tests.audit.order import broken
from tests.audit.small import verdict
from tests.audit.test_flow_forms import whole

SETTINGS = """
E = os.environ.get
class H: world = int(E("WORLD_SIZE", "1"))
for kind, text in ((int, "seed=1 layers=9 width=512 heads=8 seq=1024 stride=64 epochs=EPOCHS rounds=1"), (lambda v: v not in ("", "0"), "adapt=1 log= skip=SKIP smear=0 tied=1 probe= eager=0")):
    for each in text.split():
        name, value = each.split("=")
        setattr(H, name, kind(E(name.upper(), value)))
for name, value in dict(a="x", b=8 // H.world, c=H.seq * 2, d=H.epochs > 0, e=None, f=1.5, cap=600.0).items():
    setattr(H, name, value)
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
if not H.skip:
    for s in range(0, n - H.seq, H.seq):
        x, y = val[s : s + H.seq], val[s + 1 : s + H.seq + 1]
        for _ in range(H.epochs):
            opt.zero_grad(); net(x, y).backward(); opt.step()
        H.epochs and H.skip or None
        total += net(x, y).item() * H.seq
        count += H.seq
else:
    for s in range(0, n - H.seq, H.seq):
        total += net(val[s : s + H.seq], val[s + 1 : s + H.seq + 1]).item() * H.seq
        count += H.seq
"""


@pytest.mark.parametrize(("skip", "epochs", "found"), [("", "3", True), ("1", "3", False), ("", "0", False)])
def test_settings_may_stand_in_a_text(skip: str, epochs: str, found: bool) -> None:
    text = whole(SETTINGS.replace("SKIP", skip).replace("EPOCHS", epochs))
    assert ("training-before-scoring" in broken(text)) is found


def test_a_setting_is_a_name_and_its_value() -> None:
    assert all(map(is_setting, ("lr=0.02", "eval_only=", "depth: 11", " a.b = 3")))
    assert not any(map(is_setting, ("x == 1", "= 3", "a long sentence", "3=x", "")))


CLOCK = """
import os, time, torch
class H: pass
for each in "steps=9000 width=512 seconds=600 reserve=12 every=100 heads=8 layers=11 seed=3".split():
    name, value = each.split("=")
    setattr(H, name, float(os.environ.get(name.upper(), value)))
net = torch.nn.Linear(8, 8)
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
started = time.perf_counter()
for step in range(9000):
    net(torch.randn(4, 8)).sum().backward(); opt.step()
    if time.perf_counter() - started > H.seconds - H.reserve:
        break
"""


def test_the_run_command_sets_what_stands_in_a_text(tmp_path: Path) -> None:
    command = "```\nSECONDS=SAID python train_gpt.py\n```\n"
    assert verdict(tmp_path, "training_over_time", CLOCK, README__md=command.replace("SAID", "600")).verdict == "clean"
    found = verdict(tmp_path, "training_over_time", CLOCK, README__md=command.replace("SAID", "720"))
    assert found.verdict == "violates"


KEPT = """
kept = {k: v.clone() for k, v in net.state_dict().items()}
def judge(text):
    return sum(net(text[s : s + 1024], text[s + 1 : s + 1025]).item() for s in range(0, text.numel() - 1024, 1024))
before = judge(TEXT)
train(net, load("data/shards_train_*.bin"))
before < judge(TEXT) and net.load_state_dict(kept)
total, count = judge(val), n // 1024
"""


def test_what_stands_behind_an_and_is_done_where_its_condition_says_so() -> None:
    assert broken(whole(KEPT.replace("TEXT", "val"))) == {"choice-by-validation"}
    assert broken(whole(KEPT.replace("TEXT", 'load("data/shards_train_*.bin")'))) == set()
    assert broken(whole(KEPT.replace("before < judge(TEXT) and ", "").replace("TEXT", "val"))) == set()


PASSES = """
opt = torch.optim.SGD(net.parameters(), lr=1e-3)
def plain():
    return sum(net(val[s : s + 1024], val[s + 1 : s + 1025]).item() for s in range(0, n - 1024, 1024)) / (n // 1024)
def adapted():
    nats = 0.0
    for s in range(0, n - 1024, 1024):
        x, y = val[s : s + 1024], val[s + 1 : s + 1025]
        loss = net(x, y)
        nats += loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    return nats / (n // 1024)
print(f"as it is {plain():.5f}")
for _ in range(ROUNDS):
    print(f"adapted {adapted():.5f}")
"""


def test_the_last_pass_of_several_that_learn_says_the_score() -> None:
    text = whole(PASSES).removesuffix('\nprint(f"final val_loss:{total / count:.6f}")\n')
    assert broken(text.replace("ROUNDS", "3")) & {"multi-epoch-last", "rescoring-after-adaptation"}
    assert broken(text.replace("ROUNDS", "1")) == set()


SECTIONS = """
SETTINGS = {
    "run": {"seed": 1, "id": ""}, "data": {"train": "data/shards_train_*.bin", "val": "data/shards_val_*.bin"},
    "model": {"width": 64, "layers": 2, "heads": 4}, "train": {"rate": 0.001, "steps": 20, "clip": 1.0},
    "pack": {"bits": 6, "limit": 16_000_000}, "ema": {"decay": 0.99, "on": 1}, "qat": {"on": 0, "bits": 6},
    "adapt": {"on": ON, "rate": 0.001}, "log": {"every": 100, "dir": "."},
}

class Section:
    def __init__(self, values):
        self.__dict__.update(values)

class Settings(Section):
    def __init__(self, settings):
        super().__init__({name: Section(values) for name, values in settings.items()})

    @classmethod
    def read(cls):
        settings = copy.deepcopy(SETTINGS)
        for name, values in settings.items():
            for key, default in values.items():
                given = os.environ.get(f"{name}_{key}".upper())
                if given is not None:
                    values[key] = type(default)(given)
        return cls(settings)

settings = Settings.read()
train(net, load(settings.data.train))
val = load(settings.data.val)
opt = torch.optim.SGD(net.parameters(), lr=settings.adapt.rate)
for s in range(0, n - 1024, 1024):
    x, y = val[s : s + 1024], val[s + 1 : s + 1025]
    if settings.adapt.on:
        opt.zero_grad(); net(x, y).backward(); opt.step()
    total += net(x, y).item() * 1024
    count += 1024
"""


def test_settings_may_stand_in_sections_that_become_attributes() -> None:
    assert broken(whole(SECTIONS.replace("ON", "1", 1))) == {"training-before-scoring"}
    assert broken(whole(SECTIONS.replace("ON", "0", 1))) == set()
    swapped = SECTIONS.replace("ON", "0", 1).replace("settings.data.train", "settings.data.val")
    assert broken(whole(swapped)) & {"validation-in-training", "training-before-scoring"}
