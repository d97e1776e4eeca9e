"""The code that a check makes scripts with: the checkout, its commit's files, or the checkout in its place."""

import shutil
import subprocess

import pytest

from fairway.base.errors import ContractError, DataError
from fairway.lab.submit.check import Check, _bits, _made
from fairway.lab.submit.commits import Code, code_of
from fairway.lab.submit.export import HOUSE, house_sha256
from fairway.verbs import submitting

IDENTITY = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")


def git(folder, *words):
    done = subprocess.run(["git", "-C", str(folder), *IDENTITY, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def house(tmp_path):
    """A repository of a small package, committed and then changed; (its folder, the commit, the committed hash)."""
    folder = tmp_path / "repository" / "src" / "house"
    (folder / "room").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "room" / "one.py").write_text("ONE = 1\n")
    git(tmp_path / "repository", "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "one")
    commit, committed = git(folder, "rev-parse", "--short=12", "HEAD"), house_sha256(folder)
    (folder / "room" / "one.py").write_text("ONE = 2\n")
    return folder, commit, committed


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_this_code_serves_where_it_is_the_records(house):
    """Whatever git says: an installed package has no commit, and a checkout may differ from its own."""
    folder, _, _ = house
    for commit in (None, "0" * 12, "0" * 12 + "+"):
        with code_of(commit, house_sha256(folder), folder) as code:
            assert code == Code(folder.parent, "checkout")


def test_a_commits_files_are_taken_out_and_nothing_is_left(house, temporary):
    folder, commit, committed = house
    before = git(folder, "status", "--porcelain")
    with code_of(commit, committed, folder) as code:
        assert code.of == "commit"
        assert (code.source / "house" / "room" / "one.py").read_text() == "ONE = 1\n"
        assert house_sha256(code.source / "house") == committed
        assert (folder / "room" / "one.py").read_text() == "ONE = 2\n"
    assert list(temporary.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), code_of(commit, committed, folder):
        raise KeyboardInterrupt
    assert list(temporary.iterdir()) == []
    assert git(folder, "status", "--porcelain") == before
    assert len(git(folder, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize("commit", [None, "0" * 12, "dirty+", "--output=x", "HEAD"])
def test_a_commit_that_is_not_at_hand_is_said(house, temporary, commit):
    """A commit with "+" is no commit: files differed from it."""
    folder, clean, _ = house
    with code_of(f"{clean}+" if commit == "dirty+" else commit, "f" * 64, folder) as code:
        assert code == Code(folder.parent, "other")
    assert not (folder / "x").exists()


def test_a_commit_of_other_code_than_the_record_says_is_refused(house):
    folder, commit, _ = house
    with pytest.raises(DataError, match=f"commit {commit}: its code is .*, the record's ffffffffffff"):  # noqa: SIM117
        with code_of(commit, "f" * 64, folder):
            raise AssertionError("no code may be given out")


def test_the_scripts_are_those_of_the_records_code(two_runs, tmp_path):
    """A package beside this one, with one number changed: its scripts hold that number, this package's do not."""
    other = shutil.copytree(HOUSE, tmp_path / "src" / "fairway", ignore=shutil.ignore_patterns("__pycache__"))
    clock = other / "base" / "clock.py"
    clock.write_text(clock.read_text().replace("is over the", "is far over the"))
    recipe, place = two_runs / "tiny-1" / "recipe.toml", tmp_path / "place"
    place.mkdir()
    made = _made(Code(other.parent, "commit"), recipe, place)
    assert list(place.iterdir()) == []
    assert made["train_gpt.py"] != (two_runs / "tiny-1" / "train_gpt.py").read_bytes()
    clock.write_text(clock.read_text().replace("is far over the", "is over the"))
    made = _made(Code(other.parent, "commit"), recipe, place)
    assert made == {name: (two_runs / "tiny-1" / name).read_bytes() for name in made}


@pytest.mark.parametrize("output", ["1\n", "", "{}", '{"code_length_bits": null}', "no score"])
def test_an_answer_that_is_no_score_is_one_line(output):
    with pytest.raises(ContractError, match=r"score\.py: its answer is no score: ") as caught:
        _bits("score.py", output)
    assert "\n" not in str(caught.value)
    assert _bits("score.py", '{"code_length_bits": 8.5}') == 8.5


@pytest.mark.parametrize(
    ("exact", "ours", "says"),
    [
        (True, 2.0, "same     2 of the first steps, to the bit: the run's own hardware"),
        (True, 2.000001, "DIFFERS  2 of the first steps, to the bit: the run's own hardware"),
        (False, 2.000001, "same     2 of the first steps, within 0.0001: other hardware"),
        (False, 2.1, "DIFFERS  2 of the first steps, within 0.0001: other hardware"),
    ],
)
def test_the_row_of_losses_says_what_was_asked_of_them(monkeypatch, tmp_path, capsys, exact, ours, says):
    losses = {"script": [3.0, ours], "run": [3.0, 2.0]}
    found = Check({"score.py": True}, {"record": "a", "code": "b"}, "commit", [], 1, 9, {}, losses, exact, [])
    found.scores.update(script=1.0, package=1.0)
    monkeypatch.setattr("fairway.lab.submit.check", lambda *_: found)
    if found.same_losses:
        submitting._check(tmp_path, tmp_path, "cpu", False)
    else:
        with pytest.raises(ContractError, match="first losses are not the run's"):
            submitting._check(tmp_path, tmp_path, "cpu", False)
    out = " ".join(capsys.readouterr().out.split())
    assert " ".join(says.split()) in out
    assert "the bytes that the code of a makes" in out
