"""Training text that is read again while the score is made, after the model's file was written."""

from pathlib import Path

import pytest

from tests.audit.order import HEAD, broken, doubted
from tests.audit.small import verdict

EVALUATED = """
def settle(model, loader):
    opt = torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=1e-4)
    for _ in range(100):
        opt.zero_grad()
        model(*loader.next(4096)).backward()
        opt.step()

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    train(args, model)
    BEFORE
    torch.save(model.state_dict(), "model.pt")
    model.load_state_dict(torch.load("model.pt"))
    AFTER
    print("final val_loss", eval_val(args, model, val))
"""
SETTLE = "settle(model, Loader(args.train_files))"
KEPT = "kept = {k: v.clone() for k, v in model.state_dict().items()}"


def script(before: str = "pass", after: str = "pass") -> str:
    return HEAD + EVALUATED.replace("BEFORE", before).replace("AFTER", after)


def test_settling_on_training_text_before_the_file_is_written_is_training() -> None:
    assert doubted(script(before=SETTLE)) == set()


def test_settling_on_training_text_after_the_file_was_written_is_found() -> None:
    assert broken(script(after=SETTLE)) == {"calibration-after-cap"}


@pytest.mark.parametrize("after", ["pass", f"{KEPT}; {SETTLE}; model.load_state_dict(kept)"])
def test_steps_that_are_taken_back_leave_no_trace(after: str) -> None:
    assert doubted(script(after=after)) == set()


def test_counts_of_training_text_read_at_the_evaluation_are_found() -> None:
    counted = """text = load(args.train_files)
    seen = torch.ones(1024, 1024)
    seen.index_put_((text[:-1], text[1:]), torch.ones(text.numel() - 1), accumulate=True)"""
    scored = """total, count = 0.0, 0
    for s in range(0, val.numel() - 65, 64):
        x, y = val[s : s + 64], val[s + 1 : s + 65]
        mixed = 0.9 * torch.softmax(model.forward_logits(x), -1) + 0.1 * seen[x] / seen[x].sum(1, keepdim=True)
        total += -torch.log(mixed.gather(1, y[:, None])).sum().item()
        count += 64
    print("final val_loss", total / count)"""
    own = script(before=counted).replace('print("final val_loss", eval_val(args, model, val))', scored)
    stored = own.replace('model.state_dict(), "model.pt"', '{"w": model.state_dict(), "n": seen}, "model.pt"')
    stored = stored.replace(
        'model.load_state_dict(torch.load("model.pt"))', 'model.load_state_dict(torch.load("model.pt")["w"])'
    )
    assert "calibration-after-cap" not in broken(stored)
    late = script(after=counted).replace('print("final val_loss", eval_val(args, model, val))', scored)
    assert broken(late) == {"calibration-after-cap"}


# ---- a clock that is set back

CLOCKED = """
class Watch:
    def __init__(self):
        self.since = time.perf_counter()

    def read(self):
        return time.perf_counter() - self.since

    def begun(self):
        self.since = time.perf_counter()
        return self

def step(model, loader):
    loss = model(*loader.next(4096))
    loss.backward()
    return loss

if __name__ == "__main__":
    args = Hyperparameters()
    val, model, loader = load(args.val_files), GPT(), Loader(args.train_files)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    spent, number, looped = 0.0, 0, False
    watch = Watch()
    t0 = time.perf_counter()
    while spent + time.perf_counter() - t0 < args.cap and watch.read() < args.cap:
        fetched = time.perf_counter()
        if number % 1000 == 0:
            spent += time.perf_counter() - t0
            print("step", number, "val_loss", eval_val(args, model, val))
            t0 = time.perf_counter()
        step(model, loader)
        optimizer.step()
        number += 1
        if number == 300:
            looped = True
            AGAIN
    t1 = time.perf_counter()
    fetched = time.perf_counter()
    print("final val_loss", eval_val(args, model, val))
"""
SET_BACK = {
    "anew": "t0 = time.perf_counter()",
    "another": "watch = Watch()",
    "another, begun": "watch = Watch().begun()",
    "moved on": "t0 += 0.5 * (time.perf_counter() - fetched)",
    "to nought": "watch.since = 0.0",
    "its field anew": "watch.since = time.perf_counter()",
    "a share of the sum": "spent *= 0.9",
    "the same, written out": "spent = 0.9 * spent",
    "less some seconds": "spent -= 4.0",
    "a key of it to nought": "watch.total['train'], watch.since = 0.0, time.perf_counter()",
}
KEPT_UP = {
    "counted before": "spent += time.perf_counter() - t0\n            t0 = time.perf_counter()",
    "counted elsewhere": "spent = 12.0 + watch.read()\n            t0 = time.perf_counter()",
    "no step within": "paused = time.perf_counter()\n            t0 += time.perf_counter() - paused",
    "a clock of its own": "started = time.perf_counter()",
    "a name that a later time has": "t1 = time.perf_counter()",
    "more than it was": "spent *= 1.02",
    "its field anew, told before": "spent += watch.read()\n            watch.since = time.perf_counter()",
    "told before": "spent += watch.spent\n            watch.spent = 0.0",
}


@pytest.mark.parametrize("name", SET_BACK)
def test_a_clock_that_is_set_back_in_its_loop_counts_too_little(tmp_path: Path, name: str) -> None:
    text = HEAD + CLOCKED.replace("AGAIN", SET_BACK[name])
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == "violates"
    assert found.place is not None
    assert text.split("\n")[found.place.line - 1].strip() == SET_BACK[name]


def test_a_clock_that_begins_beside_another_name_is_set_back_as_well(tmp_path: Path) -> None:
    text = CLOCKED.replace(
        "    t0 = time.perf_counter()\n    while", "    t0, halt = time.perf_counter(), None\n    while"
    )
    found = verdict(tmp_path, "training_over_time", HEAD + text.replace("AGAIN", SET_BACK["anew"]))
    assert found.verdict == "violates"
    assert "is set back here" in found.evidence


@pytest.mark.parametrize(
    ("before", "wanted"), [("run.note(number)", "violates"), ("run.spent += time.perf_counter() - t0", "clean")]
)
def test_what_is_asked_of_an_object_that_counts_the_time_keeps_none_of_it(
    tmp_path: Path, before: str, wanted: str
) -> None:
    """The time is counted into a field: another method of its object says nothing of it."""
    run = "class Run:\n    spent = 0.0\n\n    def note(self, number):\n        print(number)\n\n"
    text = CLOCKED.replace("spent + time", "run.spent + time").replace("spent += time", "run.spent += time")
    text = text.replace("spent, number, looped = 0.0, 0, False", "run, number, looped = Run(), 0, False")
    text = text.replace("def step(model", f"{run}def step(model")
    text = HEAD + text.replace("AGAIN", f"{before}\n            {SET_BACK['anew']}")
    assert verdict(tmp_path, "training_over_time", text).verdict == wanted


@pytest.mark.parametrize(
    ("elapsed", "wanted"), [("time.perf_counter() - t0", "violates"), ("spent + time.perf_counter() - t0", "clean")]
)
def test_what_was_summed_before_a_clock_is_set_back_is_part_of_what_ends_the_loop(
    tmp_path: Path, elapsed: str, wanted: str
) -> None:
    asked = "    while spent + time.perf_counter() - t0 < args.cap and watch.read() < args.cap:\n"
    assert asked in CLOCKED
    ends = f"        elapsed = {elapsed}\n        if elapsed >= args.cap:\n            break\n"
    text = HEAD + CLOCKED.replace(asked, f"    while True:\n{ends}").replace("AGAIN", "pass")
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == f"elapsed = {elapsed}"


CALLED = """
class Step:
    def __init__(self, model, loader):
        self.model, self.loader = model, loader

    def __call__(self):
        return step(self.model, self.loader)
"""


def test_an_object_that_learns_when_it_is_called_is_a_step(tmp_path: Path) -> None:
    text = CLOCKED.replace('if __name__ == "__main__":', f'{CALLED}\nif __name__ == "__main__":')
    text = text.replace("        step(model, loader)\n        opt", "        learn()\n        opt")
    text = text.replace("    watch = Watch()\n", "    watch = Watch()\n    learn = Step(model, loader)\n", 1)
    text = HEAD + text.replace("AGAIN", SET_BACK["anew"])
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == "violates"
    assert "is set back here" in found.evidence


@pytest.mark.parametrize("name", KEPT_UP)
def test_a_clock_whose_time_is_kept_is_none(tmp_path: Path, name: str) -> None:
    text = HEAD + CLOCKED.replace("AGAIN", KEPT_UP[name])
    assert verdict(tmp_path, "training_over_time", text).verdict == "clean"


@pytest.mark.parametrize("taken", ["loss.backward()", "torch.autograd.grad(loss, list(model.parameters()))"])
def test_a_gradient_by_its_name_is_a_step_as_well(tmp_path: Path, taken: str) -> None:
    text = HEAD + CLOCKED.replace("AGAIN", SET_BACK["another"]).replace("loss.backward()", taken)
    assert verdict(tmp_path, "training_over_time", text).verdict == "violates"


STOPWATCH = """
class Stopwatch:
    def __init__(self):
        self.total, self.since = 0.0, None

    def go(self):
        self.since = time.perf_counter()
        return self

    def halt(self):
        self.total += time.perf_counter() - self.since
        self.since = None

    def lap(self):
        self.total, self.since = 0.0, time.perf_counter()

    def seconds(self):
        return self.total + (time.perf_counter() - self.since if self.since else 0.0)

class Trainer:
    def __init__(self, model, loader):
        self.model, self.loader, self.watch = model, loader, None
        self.watch = Stopwatch()

    def run(self, args, val):
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        initial = copy.deepcopy(self.model.state_dict())
        self.watch.go()
        number = 0
        while self.watch.seconds() < args.cap:
            loss = self.model(*self.loader.next(4096))
            loss.backward()
            optimizer.step()
            number += 1
            if number % 1000 == 0:
                self.watch.halt()
                print("step", number, "val_loss", eval_val(args, self.model, val))
                self.watch.go()
            if number == 300:
                AGAIN

if __name__ == "__main__":
    args, model = Hyperparameters(), GPT()
    val = load(args.val_files)
    Trainer(model, Loader(args.train_files)).run(args, val)
    print("final val_loss", eval_val(args, model, val))
"""
TOLD = 'print(f"settled after {self.watch.seconds():.1f} s")\n                '


@pytest.mark.parametrize(
    ("again", "wanted"),
    [
        (f"{TOLD}self.watch = Stopwatch().go()", "violates"),
        (f"{TOLD}self.watch.lap()", "violates"),
        ("args.cap -= self.watch.seconds()\n                self.watch.lap()", "clean"),
        (TOLD.strip(), "clean"),
        ("self.model.load_state_dict(initial)\n                self.watch.lap()", "clean"),
    ],
    ids=["another", "a-lap", "taken-off-the-cap", "told", "put-back"],
)
def test_a_message_keeps_nothing_of_what_a_clock_has_counted(tmp_path: Path, again: str, wanted: str) -> None:
    text = HEAD + STOPWATCH.replace("AGAIN", again)
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == again.split("\n")[-1].strip()


# ---- steps after the clock


def after_the_clock(before: str = "", cap: str = "args.cap - args.reserve") -> str:
    return script(before=before).replace("args.cap - args.reserve", cap)


READ = "print('train_time', time.perf_counter())"


@pytest.mark.parametrize(
    ("before", "cap"),
    [(SETTLE, "args.cap"), (f"{READ}; {SETTLE}", "args.cap - args.reserve")],
    ids=["nothing kept back", "the time was told before"],
)
def test_steps_after_the_clock_has_ended_the_training_are_in_no_600_seconds(
    tmp_path: Path, before: str, cap: str
) -> None:
    found = verdict(tmp_path, "training_over_time", after_the_clock(before, cap))
    assert found.verdict == "violates"
    assert "after the clock ended" in found.evidence


@pytest.mark.parametrize(
    ("before", "cap"),
    [
        (SETTLE, "args.cap - args.reserve"),
        (f"{READ}; {SETTLE}; {READ}", "args.cap - args.reserve"),
        (f"{READ}; {SETTLE}; torch.save(model, 'w.pt'); {READ}", "args.cap - args.reserve"),
        (f"{READ}; t0 = time.perf_counter(); {SETTLE}", "args.cap - args.reserve"),
        (f"{KEPT}; {SETTLE}; model.load_state_dict(kept)", "args.cap"),
        ("", "args.cap"),
    ],
    ids=[
        "time was kept back",
        "told after it",
        "told after its file",
        "a time that begins before it",
        "thrown away",
        "no steps",
    ],
)
def test_steps_for_which_time_was_kept_back_are_in_them(tmp_path: Path, before: str, cap: str) -> None:
    assert verdict(tmp_path, "training_over_time", after_the_clock(before or "pass", cap)).verdict == "clean"


UNDER_ONE = """
class Clock:
    def __enter__(self):
        self.since = time.perf_counter()
        return self
    def __exit__(self, *error):
        self.spent = time.perf_counter() - self.since
    @property
    def seconds(self):
        return time.perf_counter() - self.since

def build(args, model):
    clock, loader = Clock(), Loader(args.train_files)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with clock:
        while clock.seconds < LIMIT:
            model(*loader.next(65536)).backward()
            opt.step()
        print("train_time", clock.seconds)
        WITHIN
        torch.save(model.state_dict(), "model.pt")
    print("build_time", clock.spent)
    AFTER

def settle(model, loader):
    opt = torch.optim.SGD(model.parameters(), lr=1e-4)
    for _ in range(40):
        model(*loader.next(65536)).backward()
        opt.step()

if __name__ == "__main__":
    args = Hyperparameters()
    val, model = load(args.val_files), GPT()
    build(args, model)
    print("final val_loss", eval_val(args, model, val))
"""


@pytest.mark.parametrize(
    ("within", "after", "limit", "wanted"),
    [
        (SETTLE, "pass", "args.cap - args.reserve", "clean"),
        ("pass", SETTLE, "args.cap - args.reserve", "violates"),
        (SETTLE, "pass", "args.cap", "violates"),
    ],
    ids=["under the clock that goes on", "after it", "nothing kept back"],
)
def test_steps_under_the_clock_of_the_training_are_in_its_seconds(
    tmp_path: Path, within: str, after: str, limit: str, wanted: str
) -> None:
    """`with clock:` ends when the file is written: what was fitted before it was told last is in its time."""
    text = HEAD + UNDER_ONE.replace("WITHIN", within).replace("AFTER", after).replace("LIMIT", limit)
    assert verdict(tmp_path, "training_over_time", text).verdict == wanted


BEGUN = """
class Clock:
    def __init__(self, limit):
        self.limit, self.since = limit, None

    def start(self):
        self.since = time.perf_counter()

    def read(self):
        return time.perf_counter() - self.since KEPT

if __name__ == "__main__":
    args = Hyperparameters()
    val, model, loader = load(args.val_files), GPT(), Loader(args.train_files)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    clock, number = Clock(args.cap), 0
    clock.start()
    while clock.read() < args.cap:
        model(*loader.next(4096)).backward()
        optimizer.step()
        number += 1
        if number == 400:
            BEFORE
            clock.start()
    print("final val_loss", eval_val(args, model, val))
"""
LOOKED_AT = """
def look(args, model, val, clock):
    clock.pause()
    print("val_loss", eval_val(args, model, val), clock.since)
    clock.start()

"""


@pytest.mark.parametrize(("read", "wanted"), [("", "violates"), ("+ self.kept", "clean")])
def test_a_helper_that_starts_a_clock_again_is_looked_into(tmp_path: Path, read: str, wanted: str) -> None:
    paused = "    def pause(self):\n        self.kept = self.read()\n\n    def read(self)"
    text = BEGUN.replace("KEPT", read).replace("    def read(self)", paused)
    text = text.replace("            BEFORE\n            clock.start()", "            look(args, model, val, clock)")
    text = HEAD + text.replace("\nif __name__", LOOKED_AT + "if __name__")
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1] == "    clock.start()"
        assert found.place.line < text[: text.index("if __name__")].count("\n")


PHASES = """
def run_train(args, model):
    optimizer, loader = torch.optim.AdamW(model.parameters(), lr=1e-3), Loader(args.train_files)
    t0 = time.perf_counter()
    while time.perf_counter() - t0 < args.cap - args.reserve:
        model(*loader.next(4096)).backward()
        optimizer.step()
    torch.save(model.state_dict(), "train.pt")

def run_quantise(args, model):
    t0 = time.perf_counter()
    model.load_state_dict(torch.load("train.pt"))
    seen = {}
    hook = model.head.register_forward_pre_hook(lambda m, i: seen.update(h=i[0].detach().square().mean()))
    model.forward_logits(load(args.train_files)[:1024][None])
    hook.remove()
    if time.perf_counter() - t0 > args.cap:
        raise SystemExit("the calibration took too long")
    torch.save({k: (v / seen["h"]).half() for k, v in model.state_dict().items()}, "model.pt")

if __name__ == "__main__":
    args = Hyperparameters()
    for phase in (run_train, run_quantise):
        phase(args, GPT())
    model = GPT()
    model.load_state_dict(torch.load("model.pt"))
    print("final val_loss", eval_val(args, model, load(args.val_files)))
"""


@pytest.mark.parametrize(("cap", "wanted"), [("args.cap - args.reserve", "clean"), ("args.cap", "violates")])
def test_a_check_in_a_later_phase_ends_no_training(tmp_path: Path, cap: str, wanted: str) -> None:
    text = HEAD + PHASES.replace("t0 < args.cap - args.reserve", f"t0 < {cap}")
    assert verdict(tmp_path, "calibration_after_cap", text).verdict == wanted


@pytest.mark.parametrize(
    ("before", "kept", "wanted"),
    [
        ("pass", "", "violates"),
        ("print(number)", "", "violates"),
        ("args.cap -= clock.read()", "", "clean"),
        ("clock.kept = clock.read()", "+ self.kept", "clean"),
    ],
)
def test_a_clock_that_is_started_again_knows_nothing_of_the_time_before(
    tmp_path: Path, before: str, kept: str, wanted: str
) -> None:
    text = HEAD + BEGUN.replace("BEFORE", before).replace("KEPT", kept)
    found = verdict(tmp_path, "training_over_time", text)
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 2].strip() == before
