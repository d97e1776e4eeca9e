"""A trial whose clock goes on: what a training loop takes on the wall, whatever the script's arithmetic makes of it."""

import ast

import pytest

from fairway.audit.passes.restarts import looks
from fairway.audit.rules import training_over_time
from fairway.audit.weighing import timed
from tests.audit.order import HONEST, case_of

LOOP = """        elapsed = time.perf_counter() - t0
        if elapsed >= args.cap - args.reserve:
            break
        x, y = loader.next(65536)
        loss = model(x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
"""
WATCH = """
import contextlib
class Watch:
    def __init__(self):
        self.spent, self.since = 0.0, time.perf_counter()
    def stop(self):
        self.spent += time.perf_counter() - self.since
    def start(self):
        self.since = time.perf_counter()
    def read(self):
        return self.spent + time.perf_counter() - self.since
    @contextlib.contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()
watch = Watch()
"""


def trained(old: str, new: str, before: str = "", told: str = "") -> str:
    assert LOOP in HONEST
    assert old in LOOP
    loop = LOOP.replace(old, new)
    if "watch" in loop:
        loop = loop.replace("time.perf_counter() - t0", "watch.read()")
        before = WATCH + before
    text = HONEST.replace(LOOP, loop).replace("def train(args, model):", f"{before}\ndef train(args, model):")
    return text.replace("    t0 = time.perf_counter()\n", f"    t0 = time.perf_counter()\n{told}")


PAUSED = {
    "a start that is moved on": (
        "        x, y = loader.next(65536)\n",
        "        t1 = time.perf_counter()\n        x, y = loader.next(65536)\n        t0 += time.perf_counter() - t1\n",
        "t0 +=",
    ),
    "a half of the step": (
        "        opt.zero_grad()\n        loss.backward()\n        opt.step()\n",
        "        t1 = time.perf_counter()\n        opt.zero_grad()\n        loss.backward()\n        opt.step()\n"
        "        t0 += 0.5 * (time.perf_counter() - t1)\n",
        "t0 +=",
    ),
    "averages": (
        "        opt.step()\n",
        "        opt.step()\n        t1 = time.perf_counter()\n"
        "        torch._foreach_lerp_(list(ema.values()), list(model.parameters()), 0.003)\n"
        "        t0 += time.perf_counter() - t1\n",
        "t0 +=",
    ),
    "a watch that is stopped": (
        "        opt.step()\n",
        "        watch.stop()\n        opt.step()\n        watch.start()\n",
        "watch.stop()",
    ),
    "a block that is not timed": (
        "        opt.step()\n",
        "        with watch.paused():\n            opt.step()\n",
        "with watch.paused",
    ),
}


@pytest.mark.parametrize("name", PAUSED)
def test_time_that_is_taken_off_the_clock_is_counted(name: str) -> None:
    old, new, at = PAUSED[name]
    text = trained(old, new)
    found = timed(case_of(text))
    assert found is not None
    assert found.seconds > 650
    lines = text.split("\n")
    near = [n for n, line in enumerate(lines, 1) if at in line]
    assert min(abs(found.line - n) for n in near) <= 3
    assert training_over_time.check(case_of(text)).verdict == "violates"


@pytest.mark.parametrize(
    "new",
    [
        "        t1 = time.perf_counter()\n"
        "        x, y = loader.next(65536)\n"
        "        waited = time.perf_counter() - t1\n",
        "        if step % 500 == 0:\n"
        "            spent = time.perf_counter() - t0\n"
        "            eval_val(args, model, val)\n"
        "            t0 = time.perf_counter() - spent\n"
        "        x, y = loader.next(65536)\n"
        "        t2 = time.perf_counter()\n"
        "        t3 = time.perf_counter() - t2\n",
    ],
    ids=["a wait that is said", "a look at the validation text"],
)
def test_what_takes_nothing_off_is_clean(new: str) -> None:
    text = trained("        x, y = loader.next(65536)\n", new, before="val = load(Hyperparameters.val_files)\n")
    assert timed(case_of(text)) is None


def test_a_clock_that_is_looked_at_once_in_a_turn_is_not_tried() -> None:
    assert timed(case_of(HONEST)) is None


def test_a_loop_that_no_clock_ends_takes_as_long_as_it_takes() -> None:
    """Its turns are counted: twice the time for each does not make them fewer."""
    old, new, _ = PAUSED["a start that is moved on"]
    text = trained(old, new).replace("        if elapsed >= args.cap - args.reserve:", "        if step >= 700:")
    assert timed(case_of(text)) is None


POLISH = """    for _ in range(STEPS):
        x, y = loader.next(65536)
        loss = model(x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for k, v in model.state_dict().items():
        ema[k].copy_(v.detach().float())
"""


@pytest.mark.parametrize(
    ("steps", "kept", "wanted"),
    [(400, 12, "violates"), (100, 12, "clean"), (900, 43, "violates"), (700, 43, "clean")],
)
def test_steps_after_the_loop_have_to_fit_in_what_the_clock_keeps_back(steps: int, kept: int, wanted: str) -> None:
    """At 50 ms a step 12 s hold 240, and 43 s hold 860: more than the turns that are gone through."""
    text = HONEST.replace('"RESERVE", 12', f'"RESERVE", {kept}').replace(
        "    model.load_state_dict(ema)\n", POLISH.replace("STEPS", str(steps)) + "    model.load_state_dict(ema)\n"
    )
    assert POLISH.replace("STEPS", str(steps)) in text
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted
    if wanted == "violates":
        assert "further steps" in found.evidence
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == f"for _ in range({steps}):"


COOL = """    until = time.perf_counter() + SECONDS
    while agreed(time.perf_counter() >= until):
        x, y = loader.next(65536)
        loss = model(x, y)
        opt.zero_grad()
        loss.backward()
        opt.step()
    for k, v in model.state_dict().items():
        ema[k].copy_(v.detach().float())
"""


@pytest.mark.parametrize(("seconds", "wanted"), [(60, "violates"), (10, "clean")])
def test_a_second_loop_with_a_clock_of_its_own_has_to_fit_in_it_as_well(seconds: int, wanted: str) -> None:
    """12 s are kept back."""
    after = COOL.replace("SECONDS", f"{seconds}.0")
    text = HONEST.replace("    model.load_state_dict(ema)\n", after + "    model.load_state_dict(ema)\n")
    text = text.replace("def train(", "def agreed(over):\n    return not bool(over)\n\n\ndef train(", 1)
    assert after in text
    assert "def agreed" in text
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted
    if wanted == "violates":
        assert "followed by another one" in found.evidence


HOLDING = """
class Clock:
    def __init__(self):
        self.spent, self.since = 0.0, time.perf_counter()
    def hold(self):
        self.spent += time.perf_counter() - self.since
    def go(self):
        self.since = time.perf_counter()
    def read(self):
        return self.spent + time.perf_counter() - self.since
"""


def test_a_loop_whose_step_is_told_to_take_its_gradients_by_another_method_learns() -> None:
    text = f"""{HOLDING}
class Trainer:
    def gradients(self):
        self.model().backward()
    def step(self):
        self.gradients()
    def fit(self):
        while self.clock.read() < 600:
            self.clock.hold()
            self.step()
            self.clock.go()
            print(self.clock.read())
"""
    assert looks(ast.parse(text)) == 3
    assert looks(ast.parse(text.replace("            self.step()\n", ""))) == 0


@pytest.mark.parametrize("drawn", [True, False])
@pytest.mark.parametrize(("held", "wanted"), [(True, "violates"), (False, "clean")])
def test_steps_while_the_clock_is_held_are_in_no_600_s(held: bool, wanted: str, drawn: bool) -> None:
    """However few: 100 steps would have their time in the 12 s that are kept back. drawn: the gradients of a warm-up
    on random tokens are left in the weights."""
    steps = POLISH.replace("STEPS", "100")
    if held:
        loop, _, rest = steps.partition("    for k, v in model")
        steps = f"    clock.hold()\n{loop}    clock.go()\n    for k, v in model{rest}"
    text = HONEST.replace("    model.load_state_dict(ema)\n", steps + "    model.load_state_dict(ema)\n")
    text = text.replace("    t0 = time.perf_counter()\n", "    clock = Clock()\n")
    text = text.replace("time.perf_counter() - t0", "clock.read()").replace(
        "def train(args, model):", f"{HOLDING}\ndef train(args, model):"
    )
    if drawn:
        random = "x, y = torch.randint(1024, (64, 1024)), torch.randint(1024, (64, 1024))"
        text = text.replace("x, y = loader.next(65536)", random, 1).replace("opt.zero_grad()", "pass")
        text = text.replace("    loader = Loader(args.train_files)\n    initial", "    initial", 1)
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted
    if held:
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == "for _ in range(100):"


@pytest.mark.parametrize("held", [True, False])
def test_a_helper_that_learns_while_the_clock_is_held_is_in_no_600_s(held: bool) -> None:
    """The loop stands in the helper, and the clock is held around its call."""
    loop, _, rest = POLISH.replace("STEPS", "100").partition("    for k, v in model")
    helper = "    def settle():\n" + "".join(f"    {row}\n" for row in loop.rstrip("\n").split("\n"))
    called = "    clock.hold()\n    settle()\n    clock.go()\n" if held else "    settle()\n"
    steps = f"{helper}{called}    for k, v in model{rest}"
    text = HONEST.replace("    model.load_state_dict(ema)\n", steps + "    model.load_state_dict(ema)\n")
    text = text.replace("    t0 = time.perf_counter()\n", "    clock = Clock()\n")
    text = text.replace("time.perf_counter() - t0", "clock.read()").replace(
        "def train(args, model):", f"{HOLDING}\ndef train(args, model):"
    )
    assert (training_over_time.check(case_of(text)).verdict == "violates") is held


@pytest.mark.parametrize(("more", "wanted"), [("0", "clean"), ("20", "clean"), ("290", "violates")])
def test_steps_on_top_of_those_that_the_clock_ends(more: str, wanted: str) -> None:
    """290 steps of 50 ms are 14.5 s, and 12 are kept back; 20 of them would have their time."""
    ending = (
        "        if elapsed >= args.cap - args.reserve and stop is None:\n            stop = step + MORE\n"
        "        if stop is not None and step >= stop:\n            break\n"
    ).replace("MORE", more)
    text = HONEST.replace("        if elapsed >= args.cap - args.reserve:\n            break\n", ending)
    text = text.replace("    step = 0\n", "    step, stop = 0, None\n")
    text = text.replace('print(f"step:{step} train_loss', 'print(f"{time.perf_counter() - t0} step:{step} train_loss')
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == "stop = step + 290"


@pytest.mark.parametrize(("more", "wanted"), [("args.more", "violates"), ("0", "clean")])
def test_steps_on_top_of_those_of_a_clock_that_is_looked_at_once(more: str, wanted: str) -> None:
    """All 600 s are used, the step that crosses the line besides: 200 steps are 10 s at the least."""
    ending = (
        "        if elapsed >= 600.0 and stop is None:\n            stop = step + MORE\n"
        "        if stop is not None and step >= stop:\n            break\n"
    ).replace("MORE", more)
    text = HONEST.replace("        if elapsed >= args.cap - args.reserve:\n            break\n", ending)
    text = text.replace("    step = 0\n", "    step, stop = 0, None\n")
    text = text.replace("    flag = bool", '    more = int(os.environ.get("MORE", 200))\n    flag = bool')
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted
    if wanted == "violates":
        assert found.place is not None
        assert text.split("\n")[found.place.line - 1].strip() == "stop = step + args.more"


@pytest.mark.parametrize(("steps", "wanted"), [(400, "violates"), (20, "clean")])
def test_steps_after_a_loop_that_ends_before_a_last_step_would_cross_the_limit(steps: int, wanted: str) -> None:
    """What the clock keeps back is a step or two of the script's own, of which the walk knows no length."""
    ending = "        if elapsed + 2.0 * elapsed / max(step, 1) >= 600.0:\n            break\n"
    text = HONEST.replace("        if elapsed >= args.cap - args.reserve:\n            break\n", ending)
    polish = POLISH.replace("STEPS", str(steps))
    text = text.replace("    model.load_state_dict(ema)\n", polish + "    model.load_state_dict(ema)\n")
    assert training_over_time.check(case_of(text)).verdict == wanted


@pytest.mark.parametrize("settled", ["args.settled", "400"], ids=["a setting", "written out"])
def test_a_clock_that_is_set_back_after_more_steps_than_a_trial_takes(settled: str) -> None:
    """A step takes 2 s here, so that 600 s are 300: the number is taken for an earlier step."""
    sets = f"        step += 1\n        if step == {settled}:\n            clock.spent = 0.0\n            clock.go()\n"
    text = HONEST.replace("    t0 = time.perf_counter()\n", "    clock = Clock()\n")
    text = text.replace(
        "        elapsed = time.perf_counter() - t0\n",
        "        clock.hold()\n        clock.go()\n        elapsed = clock.read()\n",
    )
    text = text.replace("def train(args, model):", f"{HOLDING}\ndef train(args, model):")
    text = text.replace("    flag = bool", '    settled = int(os.environ.get("SETTLED", 400))\n    flag = bool')
    assert timed(case_of(text)) is None
    found = timed(case_of(text.replace("        step += 1\n", sets)))
    assert found is not None
    assert found.seconds > 610
    lines = text.replace("        step += 1\n", sets).split("\n")
    assert lines[found.line - 1].strip() == "clock.spent = 0.0"


ROW_BY_ROW = """    for _ in range(STEPS):
        opt.zero_grad()
        for _ in range(8):
            rows = []
            for _ in range(32):
                x, y = loader.next(1024)
                for at in range(0, 1024, 64):
                    rows.append((x[:, at : at + 64], y[:, at : at + 64]))
            loss = model(torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]))
            (loss / 8).backward()
        opt.step()
    for k, v in model.state_dict().items():
        ema[k].copy_(v.detach().float())
"""


@pytest.mark.parametrize(("steps", "wanted"), [(400, "violates"), (100, "clean")])
def test_turns_that_are_all_alike_are_counted_and_not_gone_through(steps: int, wanted: str) -> None:
    """Batches in eight parts, put together row by row: 400 such steps are more than a trial may take."""
    more = ROW_BY_ROW.replace("STEPS", str(steps))
    text = HONEST.replace("    model.load_state_dict(ema)\n", more + "    model.load_state_dict(ema)\n")
    assert more in text
    assert training_over_time.check(case_of(text)).verdict == wanted


TRAINER = """
class Watch:
    def __init__(self):
        self.spent, self.since = 0.0, None
    def start(self):
        self.since = time.perf_counter()
    def stop(self):
        self.spent += time.perf_counter() - self.since
        self.since = None
    def read(self):
        return self.spent + (time.perf_counter() - self.since if self.since is not None else 0.0)
class Trainer:
    def __init__(self, args, model, opt, loader):
        self.args, self.model, self.opt, self.loader, self.watch = args, model, opt, loader, Watch()
    def rows(self, many):
        x = torch.zeros(many, 1024, dtype=torch.int64)
        for row in range(many):
            a, b = self.loader.next(1024)
            c = a[:-1]
            d = c[1:]
            e = d.view(-1)
            x[row] = a[0]
        return x
    def gradients(self):
        for _ in range(8):
            PAUSE
            x = self.rows(ROWS)
            GOES_ON
            self.model(x, x).backward()
    def run(self):
        self.watch.start()
        while self.watch.read() < self.args.cap - self.args.reserve:
            self.gradients()
            self.opt.step()
            self.opt.zero_grad()
"""


def by_trainer(pause: str = "", goes_on: str = "", rows: str = "4") -> str:
    trainer = TRAINER.replace("PAUSE", pause or "pass").replace("GOES_ON", goes_on or "pass").replace("ROWS", rows)
    text = HONEST.replace("def train(args, model):", f"{trainer}\ndef train(args, model):")
    begin, end = text.index("    t0 = time.perf_counter()\n"), text.index("    model.load_state_dict(ema)\n")
    return text[:begin] + "    Trainer(args, model, opt, loader).run()\n" + text[end:]


def test_a_watch_of_an_object_is_asked_under_conditions_of_its_own() -> None:
    """`self.gradients()` takes the gradients of the loop, and `if running` does nothing but ask the watch."""
    paused = by_trainer(
        "running = self.watch.since is not None\n            if running: self.watch.stop()",
        "if running: self.watch.start()",
    )
    found = timed(case_of(paused))
    assert found is not None
    assert found.seconds > 650
    assert timed(case_of(by_trainer())) is None


def test_a_batch_that_is_read_row_by_row_leaves_steps_for_the_training() -> None:
    """512 rows of seven steps for each of eight lessons: 28,672 steps a turn, of 150,000."""
    found = timed(case_of(by_trainer("self.watch.stop()", "self.watch.start()", rows="512")))
    assert found is not None
    assert found.seconds > 650


BY_EVENTS = """
class Watch:
    def __init__(self):
        self.spent, self.since = 0.0, self.mark()
    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    def stop(self):
        self.spent += self.since.elapsed_time(self.mark())
    def start(self):
        self.since = self.mark()
    def read(self):
        return (self.spent + self.since.elapsed_time(self.mark())) / 1000.0
watch = Watch()
"""


@pytest.mark.parametrize("stops", [True, False])
def test_events_of_the_card_are_a_clock_as_well(stops: bool) -> None:
    step = "        opt.step()\n"
    paused = f"        watch.stop()\n{step}        watch.start()\n"
    running = f"        watch.read()\n{step}        watch.read()\n"
    text = trained(step, paused if stops else running).replace(WATCH, BY_EVENTS)
    found = timed(case_of(text))
    assert (found is not None) == stops
    if found is not None:
        assert found.seconds > 650


@pytest.mark.parametrize("every", ["30", "args.check_every"])
@pytest.mark.parametrize("off", [False, True])
def test_a_clock_that_is_asked_in_some_turns_alone_ends_the_loop_that_much_later(every: str, off: bool) -> None:
    """Thirty turns of a trial are 50 s, and on the machine of the challenge three."""
    old, new, _ = PAUSED["a start that is moved on"]
    text = trained(old, new if off else old + "        now = time.perf_counter() - t0\n")
    asked = f"if step % {every} == 0 and elapsed >= args.cap - args.reserve:"
    text = text.replace("if elapsed >= args.cap - args.reserve:", asked)
    text = text.replace("class Hyperparameters:", "class Hyperparameters:\n    check_every = 30", 1)
    assert (timed(case_of(text)) is not None) is off


SHARED = """
class Budget:
    def __init__(self, seconds):
        self.seconds, self.since = seconds, time.perf_counter()
    def used(self):
        return time.perf_counter() - self.since
    def over(self):
        said = torch.tensor(int(self.used() >= self.seconds))
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MAX)
        return bool(said.item())
"""


@pytest.mark.parametrize(("cap", "wanted"), [("588.0", "clean"), ("830.0", "violates"), ("830_000.0", "violates")])
def test_a_clock_whose_answer_all_ranks_share_is_read(cap: str, wanted: str) -> None:
    """The object says whether it is over: no term of the script's compares a time with 830 s, or so many ms."""
    text = trained(
        "elapsed >= args.cap - args.reserve", "budget.over()", before=SHARED, told=f"    budget = Budget({cap})\n"
    )
    text = text.replace(
        "return time.perf_counter() - self.since",
        f"return {1e3 if '_' in cap else 1.0} * (time.perf_counter() - self.since)",
    )
    found = training_over_time.check(case_of(text))
    assert found.verdict == wanted, found
    assert ("830 s" in found.evidence) == (wanted == "violates")


AHEAD = """        elapsed = time.perf_counter() - t0
        if stop_after is not None and step >= stop_after:
            break
        if stop_after is None and elapsed >= args.cap - args.reserve:
            stop_after = step + args.settle
        x, y = loader.next(65536)
        step_on(model, opt, x, y)
"""
STEP_ON = """
def step_on(model, opt, x, y):
    loss = model(x, y)
    opt.zero_grad()
    loss.backward()
    opt.step()

"""


@pytest.mark.parametrize(("settle", "found"), [(1500, True), (110, False)])
def test_an_end_that_lies_more_steps_ahead_than_a_trial_has_turns(settle: int, found: bool) -> None:
    """12 s are kept back; at 50 ms a step they hold 240."""
    text = HONEST.replace(LOOP, AHEAD).replace("def train(args, model):", f"{STEP_ON}def train(args, model):")
    text = text.replace("    t0 = time.perf_counter()\n", "    t0 = time.perf_counter()\n    stop_after = None\n")
    text = text.replace("    cap = ", f'    settle = int(os.environ.get("SETTLE", {settle}))\n    cap = ')
    assert "settle = int" in text
    long = timed(case_of(text))
    assert (long is not None) is found
    if long is not None:
        assert long.more == settle
        assert text.split("\n")[long.line - 1].strip() == "stop_after = step + args.settle"


DRAWN = """
def drawn(args, rows=64):
    paths = sorted(glob.glob(args.train))
    which = int(np.random.default_rng(7).choice(len(paths)))
    data = np.memmap(paths[which], dtype="<u2", mode="r", offset=1024)
    block = torch.from_numpy(np.asarray(data[: rows * 1024 + 1], dtype=np.int64))
    return block[:-1].view(rows, 1024), block[1:].view(rows, 1024)

"""


def test_a_batch_out_of_a_file_that_nobody_knows_takes_as_long_to_read() -> None:
    old, new, marked = PAUSED["a start that is moved on"]
    text = trained(old, new.replace("loader.next(65536)", "drawn(args)"), DRAWN)
    long = timed(case_of(text))
    assert long is not None
    assert marked in text.split("\n")[long.line - 1]


def test_a_clock_that_is_set_back_beside_its_start_by_a_trainer_that_learns_elsewhere() -> None:
    """`spent, begun = 0.0, time()` after 400 steps; the gradients are a method's of an object. An evaluation every
    4,000 steps stops the clock as well, and is no step of the clock's own."""
    trainer = """
class Trainer:
    def __init__(self, model):
        self.model, self.opt = model, torch.optim.AdamW(model.parameters())
    def accumulate(self, loader):
        x, y = loader.next(65536)
        self.model(x, y).backward()
    def apply(self):
        self.opt.step()
        self.opt.zero_grad()
"""
    taken = LOOP[LOOP.index("        x, y = loader") :]
    text = HONEST.replace(taken, "        trainer.accumulate(loader)\n        trainer.apply()\n")
    text = text.replace("def train(args, model):", f"{trainer}\ndef train(args, model):")
    text = text.replace(
        "    t0 = time.perf_counter()\n", "    trainer = Trainer(model)\n    spent, t0 = 0.0, time.perf_counter()\n"
    )
    looked = "        elapsed = time.perf_counter() - t0\n"
    text = text.replace(looked, looked.replace("= time", "= spent + time"))
    said = '            print(f"step:{step} train_loss:{loss.item():.4f}")\n'
    assert said in text
    text = text.replace(said, '            print(f"step:{step} {spent + time.perf_counter() - t0:.1f}")\n')
    held = (
        "        if step % 4000 == 0 and step:\n            spent += time.perf_counter() - t0\n"
        "            eval_val(args, model, loader.tokens)\n            t0 = time.perf_counter()\n"
    )
    text = text.replace(looked, held + looked)
    counted = "        step += 1\n"
    back = "            torch.cuda.synchronize()\n            spent, t0 = 0.0, time.perf_counter()\n"
    back = f"        if step == 400:\n{back}"
    assert timed(case_of(text)) is None
    found = timed(case_of(text.replace(counted, counted + back, 1)))
    assert found is not None
    assert found.seconds > 610
    lines = text.replace(counted, counted + back, 1).split("\n")
    assert lines[found.line - 1].strip() == "spent, t0 = 0.0, time.perf_counter()"


def test_a_loop_that_asks_its_clock_every_third_turn_is_timed_as_well() -> None:
    """By a method, so that no condition in the loop says how often. A second in six is taken off its clock."""
    ending = "        if elapsed >= args.cap - args.reserve:\n            break\n"
    asked = "time.perf_counter() - t0 if step % 3 == 0 else"
    text = HONEST.replace(ending, "        if over(args, elapsed):\n            break\n")
    over = "def over(args, elapsed):\n    return elapsed >= args.cap - args.reserve\n\n"
    text = text.replace("def train(args, model):", f"{over}def train(args, model):")
    looked = "        elapsed = time.perf_counter() - t0\n"
    seldom = "".join(f"        {name} = {asked} {name}\n" for name in ("elapsed", "said", "shown"))
    text = text.replace(looked, seldom).replace("    step = 0\n", "    step, elapsed, said, shown = 0, 0.0, 0.0, 0.0\n")
    assert timed(case_of(text)) is None
    off = "        t0 += 1.0 if step % 3 == 0 else 0.0\n"
    found = timed(case_of(text.replace("        step += 1\n", off + "        step += 1\n", 1)))
    assert found is not None
    assert found.seconds > 650
