"""The report: one page that holds all that a run or a sweep left, opens anywhere, and says what is missing."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from fairway.base import pages
from fairway.base.errors import RecipeError
from fairway.lab.report import open_folder, run_page, sweep_page
from fairway.lab.report.curves import Curve, smoothed
from fairway.score.profile import PROFILE
from tests.lab import browser
from tests.lab.folders import lines, made_run, made_sweep, point

SECTIONS = ("Stages", "Training", "The text", "Bytes", "Budgets", "Quantisation", "A sample", "Journal")
SHIFTS = {"base": 0.0, "better": -0.05, "same": 0.0001, "worse": 0.05}
needs_browser = pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_run(tmp_path_factory.mktemp("made") / "run")
    (folder / "report.html").write_text(run_page(open_folder(folder)))
    return folder


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = made_sweep(tmp_path_factory.mktemp("made") / "sweep-made", SHIFTS)
    (folder / "report.html").write_text(sweep_page(folder)[0])
    return folder


def drawn(folder: Path) -> str:
    return (folder / "report.html").read_text()


# What a page says.


def test_a_finished_run_has_every_section_and_nothing_missing(run: Path) -> None:
    page = drawn(run)
    assert re.findall(r"<h2>(.*?)</h2>", page) == list(SECTIONS)
    assert "Not everything is here" not in page
    for figure in ("1.9500", "110,000", "58,968", "91.7 %", "38,730", "42.1", "50 %", "2.4000"):
        assert figure in page, figure  # score, bytes, a section, share of the budget, parameters, seconds, GPTQ, brotli
    assert page.count("<svg") == 5


def test_the_page_is_one_file_that_asks_for_nothing(run: Path, sweep: Path) -> None:
    for page in (drawn(run), drawn(sweep)):
        assert pages.POLICY in page
        assert not re.search(r"<script|<link|<img|<iframe|@import|url\((?!#)|src=|https?:(?!//www.w3.org)", page)
        assert len(page.encode()) < 300_000


def test_what_a_text_says_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", name="<b onclick=x>")
    lines(folder / "journal.jsonl", [{"fact": "<script>a</script>", "x</code><img src=x>": "<iframe src=y>"}])
    page = run_page(open_folder(folder))
    assert not re.search(r"<script|<img|<iframe|<b onclick", page)
    assert "&lt;script&gt;" in page  # of the sample's text
    assert "&lt;b onclick=x&gt;, seed 1" in page


def test_every_letter_can_be_read_in_light_and_in_dark() -> None:
    """Contrast of 4.5 and more (WCAG 2.1) of what is written, on both grounds and on the deepest heat."""
    style = pages.page("", "")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in style.split("prefers-color-scheme: dark")]
    for names in themes:
        for ground in ("paper", "card"):
            for ink in ("ink", "quiet", "accent", "violates", "suspect", "cannot", "clean"):
                assert contrast(rgb(names[ink]), rgb(names[ground])) >= 4.5, (ink, ground, names[ink])
        deepest = [0.4 * a + 0.6 * b for a, b in zip(rgb(names["accent"]), rgb(names["card"]), strict=True)]
        assert contrast(rgb(names["ink"]), deepest) >= 4.5


def rgb(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


# A sweep.


def test_a_sweep_tells_what_compare_tells(sweep: Path) -> None:
    page = drawn(sweep)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Differences", "Tables", "Cost against gain", "Approaches", "Runs"]
    assert "1 better" not in page
    assert re.search(r"<b>1</b><span>of 3 approaches better", page)
    assert "-0.0480" in page  # better: −0.05, and 0.002 that its seeds are off
    assert "no difference shown" in page
    assert page.count("<details id=") == len(SHIFTS)
    forest = page[: page.index('id="tables"')]
    assert forest.index(">worse<") < forest.index(">better<")  # drawn upwards: the best stands at the top
    assert "the best is better with -0.0480" in forest


def test_an_unfinished_sweep_names_its_runs_and_draws_the_rest(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "sweep", {"base": 0.0, "other": -0.05}, (1, 2))
    (folder / "base-1-01" / "report.html").write_text("its own page")
    (folder / "other-2-12" / "score.json").unlink()
    lines(folder / "sweep.jsonl", [{"fact": "failed", "id": "12", "error": "BudgetError: <too> large"}])
    page, missing = sweep_page(folder)
    assert "BudgetError: &lt;too&gt; large" in page
    assert len(missing) == 1
    assert "other-2-12" in missing[0]
    assert "not enough seeds" in page
    assert set(re.findall(r'href="([^#"]+)"', page)) == {"base-1-01/report.html"}


def test_a_sweep_of_which_nothing_is_finished_says_so(tmp_path: Path) -> None:
    folder = made_sweep(tmp_path / "sweep", {"base": 0.0}, (1,))
    (folder / "base-1-01" / "score.json").unlink()
    page, missing = sweep_page(folder)
    assert "none of them finished" in missing[0]
    assert "not finished" in page
    with pytest.raises(RecipeError, match="no run folder"):
        sweep_page(tmp_path)


# What is missing, damaged or enormous.


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("score.json", None, "the run is unfinished"),
        ("score.json", b"{", "no JSON"),
        ("score.json", b"[1]", "no table of figures"),
        ("journal.jsonl", b"", "holds no fact"),
        ("journal.jsonl", b'{"fact": "run", "seed": 1}\n{"fact": "train", "sec', "Training has not ended"),
        ("curves.jsonl", None, "No point of the training curve"),
        ("curves.jsonl", b'{"curve": "train", "step": 1, "seconds": 1, "loss": NaN}\n\xff\n[]\n', "1 points"),
        (PROFILE, None, "No profile"),
        (PROFILE, b"PK no zip", "no profile of a score"),
        ("recipe.toml", b"= 3", "no TOML"),
    ],
)
def test_what_a_run_lacks_is_said(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    folder = made_run(tmp_path / "run", steps=3)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert any(says in sentence for sentence in open_folder(folder).missing)


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=5)
    for name in ("score.json", PROFILE, "artifact.fw"):
        (folder / name).unlink()
    lines(folder / "journal.jsonl", [{"fact": "run", "recipe": "tiny", "seed": 1}, {"fact": "prepare", "seconds": 1.0}])
    page = run_page(open_folder(folder))
    assert "Training has not ended" in page
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Training", "Journal"]


def test_figures_that_are_none_are_left_out_of_the_page(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=3)
    (folder / "score.json").write_text('{"stages": 3, "result": [], "proof": {}, "tokens": "many"}')
    (folder / "recipe.toml").write_text("train = 3\nscore = 4\nbudget = []\n")
    wild = [{"fact": "train", "seconds": "long"}, {"fact": "artifact", "sections": [1], "bytes": {}}, {"fact": 3}]
    quant = {"fact": "quant.blocks.0.mlp.up.weight", "objective": "NaN", "entropy": None, "zeros": 10**400}
    lines(folder / "journal.jsonl", [*wild, quant, {"fact": "quant.blocks.99999999999.x", "zeros": 0.5}])
    page = run_page(open_folder(folder))
    assert "50.0 %" in page
    assert "nan" not in page.lower()


def test_what_is_no_run_folder_is_refused_in_one_line(tmp_path: Path, fairway) -> None:
    for place, says in ((tmp_path / "none", "no such folder"), (tmp_path, "no run folder")):
        answer = fairway("report", place)
        assert (answer.code, answer.err.count("\n"), answer.out) == (2, 1, "")
        assert says in answer.err
    folder = made_run(tmp_path / "run", steps=3)
    answer = fairway("report", folder, "-o", tmp_path)
    assert answer.code == 2
    assert "a folder" in answer.err


def test_without_matplotlib_it_is_one_line_and_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made_run(tmp_path / "run", steps=3)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RecipeError, match=r"pip install 'fairway\[report\]'"):
        run_page(open_folder(folder))


def test_a_real_run_gets_its_page_from_the_command_line(tiny_run: Path, tmp_path: Path, fairway) -> None:
    answer = json.loads(fairway("report", tiny_run, "-o", tmp_path / "page.html", "--json").out)
    score = json.loads((tiny_run / "score.json").read_text())
    page = (tmp_path / "page.html").read_text()
    assert answer["bytes"] == len(page.encode())
    for value in score["stages"].values():
        assert f"{value:.4f}" in page
    assert "gradient norm" in page


# The curve.


def test_a_long_curve_keeps_a_few_hundred_points_and_its_sums(tmp_path: Path) -> None:
    count = 20_000
    lines(tmp_path / "curves.jsonl", [point(step, count) for step in range(1, count + 1)])
    curve = Curve(tmp_path / "curves.jsonl").read()
    assert 300 <= len(curve.stretches) <= 600
    assert sum(part.points for part in curve.stretches) == count
    losses = [point(step, count)["loss"] for step in range(1, count + 1)]
    assert sum(part.loss for part in curve.stretches) == pytest.approx(sum(losses))
    assert (min(curve.column("low")), max(curve.column("high"))) == (min(losses), max(losses))
    assert curve.column("steps") == sorted(curve.column("steps"))


def test_a_resumed_run_goes_over_its_last_steps_once(tmp_path: Path) -> None:
    again = [*range(1, 9), *range(5, 12)]
    lines(tmp_path / "curves.jsonl", [point(step, 20) for step in again])
    assert Curve(tmp_path / "curves.jsonl").read().column("steps") == [float(step) for step in range(1, 12)]


def test_a_curve_that_is_being_written_is_taken_up_where_it_was_left(tmp_path: Path) -> None:
    path = tmp_path / "curves.jsonl"
    row = json.dumps(point(1, 9)) + "\n"
    path.write_text(row[:30])
    curve = Curve(path).read()
    assert curve.stretches == []
    path.write_text(row + json.dumps(point(2, 9)) + "\n")
    assert curve.read().column("steps") == [1.0, 2.0]
    assert curve.read().step == 2


@given(st.lists(st.one_of(st.binary(max_size=40), st.dictionaries(
    st.sampled_from(["curve", "step", "loss", "seconds", "scale", "norm"]),
    st.one_of(st.just("train"), st.integers(), st.floats(), st.none(), st.booleans(), st.lists(st.integers())),
).map(lambda row: json.dumps({"curve": "train", **row}).encode()))))  # fmt: skip
def test_no_line_of_a_curve_is_wild_enough_to_stop_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("wild") / "curves.jsonl"
    path.write_bytes(b"\n".join(rows) + b"\n")
    curve = Curve(path, most=2).read()
    assert len(curve.stretches) <= 4
    assert all(abs(loss) < float("inf") for loss in curve.column("low"))


def test_a_trend_neither_lags_nor_bends_a_straight_line() -> None:
    line = [3.0 - 0.25 * at for at in range(40)]
    assert smoothed(line, 17) == pytest.approx(line)
    assert smoothed([0.0] * 5 + [1.0] + [0.0] * 5, 3)[4:7] == pytest.approx([1 / 3] * 3)


# In a browser.


@needs_browser
def test_a_page_opens_in_a_browser_without_a_word_a_request_or_an_overflow(run: Path, sweep: Path) -> None:
    for folder in (run, sweep):
        seen = browser.look(folder / "report.html", [390, 1280, 390])
        assert seen.console == []
        for frame in seen.frames:
            assert frame["fetched"] == []
            assert frame["needs"] <= frame["width"]
            assert frame["lost"] == []
            assert frame["nameless"] == 0
            assert len(set(frame["ids"])) == len(frame["ids"])
            assert frame["pictures"] > 3
        assert min(frame["ms"] for frame in seen.frames) < 1000  # the first one pays for the browser's own start
    assert "<script>alert(1)</script>" in browser.look(run / "report.html", [390]).frames[0]["text"]


@needs_browser
def test_the_browser_would_tell_of_a_word_a_request_and_an_overflow(tmp_path: Path) -> None:
    bad = '<p id=a style="width:600px">x</p><p id=a></p><img src="http://127.0.0.1:9/dot.svg"><svg></svg>'
    (tmp_path / "open.html").write_text(f"<!doctype html>{bad}<script>console.error('a word')</script>")
    (tmp_path / "closed.html").write_text(pages.page("closed", bad))
    seen = browser.look(tmp_path / "open.html", [390])
    assert any("a word" in line for line in seen.console)
    assert seen.frames[0]["needs"] > seen.frames[0]["width"]
    assert len(seen.frames[0]["fetched"]) == seen.frames[0]["nameless"] == 1
    assert seen.frames[0]["ids"] == ["a", "a"]
    assert any("Content Security Policy" in line for line in browser.look(tmp_path / "closed.html", [390]).console)


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)])
def test_a_page_is_light_and_dark_as_its_reader_is(run: Path, tmp_path: Path, width: int, height: int) -> None:
    grounds = []
    for scheme in (browser.LIGHT, browser.DARK):
        browser.shot(run / "report.html", tmp_path / "shot.png", width, height, scheme)
        picture = imread(tmp_path / "shot.png")[:height, :width, :3]
        assert picture.shape == (height, width, 3)
        assert picture.std() > 0.02  # something is on it
        grounds.append(picture[3, 3].mean())
    assert grounds[0] > 0.9
    assert grounds[1] < 0.15
