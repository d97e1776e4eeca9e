"""Progress: lines in a log, nothing when quiet, and never a division by zero."""

import pytest

from fairway.base import lines, progress
from fairway.verbs.bar import bar


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    return now


def test_a_quiet_meter_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.meter("train", 10, "tok", quiet=True) as meter:
        meter.update(10, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_a_line_every_five_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.meter("train", 1_000_000, "tok") as meter:
        for done in range(0, 1_000_001, 50_000):  # one update a second, 50,000 tokens each
            meter.update(done, loss=2.5)
            clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "train         25%  250k/1M tok  loss 2.5  50k tok/s  5 s, 15 s left"
    assert lines[-1].startswith("train        100%  1M/1M tok")


def test_the_last_update_is_shown_though_the_time_is_not_up(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.meter("score", 10, "windows") as meter:
        clock[0] += 2.0
        meter.update(5)
        meter.update(10)
    assert capsys.readouterr().err.splitlines() == ["score        100%  10/10 windows  5 windows/s  2 s, 0 s left"]


def test_nothing_done_in_no_time_divides_by_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for total in (0, 10):
        with progress.meter("x", total, "u") as meter:
            meter.update(0)
            clock[0] += 6.0
            meter.update(0)
    assert [line.split()[-3:] for line in capsys.readouterr().err.splitlines()] == [["?", "s", "left"]] * 2


def test_a_resumed_run_counts_its_own_rate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress.meter("train", 1000, "steps", begun=900) as meter:
        clock[0] += 10.0
        meter.update(950)
    assert capsys.readouterr().err == "train         95%  950/1,000 steps  5 steps/s  10 s, 10 s left\n"


def test_a_terminal_gets_a_bar_that_is_closed_however_the_work_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    for total in (0, 10):
        with pytest.raises(KeyError), progress.meter("train", total, "steps", bar=bar) as meter:  # noqa: PT012
            meter.update(0)
            meter.update(7, loss=1.5)
            raise KeyError
    assert "train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (0.123456, "0.123"),
        (12.3, "12.3"),
        (950, "950"),
        (1234, "1,234"),
        (9999, "9,999"),
        (12_345, "12.3k"),
        (999_999, "1000k"),
        (1_234_567, "1.23M"),
        (2.5e9, "2.5G"),
    ],
)
def test_counts_are_short_and_never_in_powers_of_ten(value: float, shown: str) -> None:
    assert lines.short(value) == shown
