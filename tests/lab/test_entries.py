"""What a record takes: a run's own files, score, recipe and code; the rest is refused in one line, nothing written."""

import json
import shutil
from copy import deepcopy

import pytest

from fairway.base.errors import DataError
from fairway.lab.submit import submit
from fairway.lab.submit.entries import entry
from fairway.lab.submit.origin import origin
from fairway.lab.submit.record import load
from fairway.lab.submit.rules import rules

OTHER = "0" * 64


@pytest.fixture
def copy(two_runs, tmp_path):
    """tiny-1 (seed 1), to be changed."""
    return shutil.copytree(two_runs / "tiny-1", tmp_path / "copy")


@pytest.fixture(scope="module")
def standing(two_runs, tmp_path_factory):
    """A record of tiny-1 and tiny-2."""
    folder = tmp_path_factory.mktemp("standing") / "record"
    submit([two_runs / "tiny-1", two_runs / "tiny-2"], folder)
    return folder


def facts_of(folder):
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def rewrite(folder, facts):
    (folder / "journal.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))


def changed(folder, name, **values):
    """The journal with all facts of a name changed; a value of None takes a key away."""
    facts = [{**fact, **values} if fact["fact"] == name else fact for fact in facts_of(folder)]
    rewrite(folder, [{key: value for key, value in fact.items() if value is not None} for fact in facts])


def replaced(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def refused(answer, family, *says):
    assert (answer.code, answer.err.count("\n")) == (2 if family == "RecipeError" else 1, 1), answer.err
    assert answer.err.startswith(f"{family}: ")
    for words in says:
        assert words in answer.err
    return True


def scored(folder, **values):
    """score.json with some values changed."""
    path = folder / "score.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def appended(path):
    with path.open("ab") as file:
        file.write(b"\0")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: (run / "artifact.fw").unlink(), "artifact.fw is missing; name a finished run"),
        (lambda run: appended(run / "artifact.fw"), "artifact.fw: not the artifact that the run booked"),
        (lambda run: scored(run, bits_per_byte=0.5), "score.json: bits_per_byte = 0.5, but "),
        (lambda run: scored(run, artifact_sha256=OTHER), f"score.json: artifact_sha256 = '{OTHER}', but "),
        (lambda run: changed(run, "score_sliding", bits_per_byte=1.0), "score.json: stages.sliding = "),
    ],
)
def test_an_artifact_and_a_score_are_the_runs_own(copy, tmp_path, fairway, change, says):
    change(copy)
    assert refused(fairway("submit", copy, "-o", tmp_path / "record"), "RecipeError", says)
    assert not (tmp_path / "record").exists()


def test_an_update_takes_no_run_of_another_text(standing, copy, tmp_path, fairway):
    """Its seed is new and its script the same: it would be averaged with scores of another text."""
    folder = shutil.copytree(standing, tmp_path / "record")
    before = (folder / "submission.json").read_bytes()
    text = json.loads((copy / "score.json").read_text())["text_sha256"]
    for name in ("score.json", "journal.jsonl"):
        replaced(copy / name, text, OTHER)
    replaced(copy / "recipe.toml", "seed = 1", "seed = 3")
    assert refused(
        fairway("submit", copy, "--update", folder), "RecipeError", f"held_out_text {OTHER[:12]}, but", "tiny-1, which"
    )
    assert (folder / "submission.json").read_bytes() == before


def test_scripts_of_other_code_than_the_runs_are_refused_and_both_are_named(copy, tmp_path, fairway):
    (code,) = [fact for fact in facts_of(copy) if fact["fact"] == "code"]
    assert {fact["code_sha256"] for fact in facts_of(copy) if fact["fact"] == "scripts"} == {code["sha256"]}
    changed(copy, "scripts", code_sha256=OTHER)
    answer = fairway("submit", copy, "-o", tmp_path / "record")
    assert refused(answer, "RecipeError", f"made by code {OTHER[:12]}", f"trained by {code['sha256'][:12]}")


def test_other_code_may_go_on_with_a_run_if_it_makes_the_same_scripts(copy):
    """What was trained counts. Other code with another script of its own would have left the artifact beside that."""
    facts = facts_of(copy)
    (code,) = [fact for fact in facts if fact["fact"] == "code"]
    (scripts,) = [fact for fact in facts if fact["fact"] == "scripts"]
    rewrite(copy, [*facts, {**code, "sha256": OTHER}, {**scripts, "code_sha256": OTHER}])
    one = entry(copy)
    assert one.row["sha256"]["code"] == code["sha256"]
    assert {line["rule"]: line["verdict"] for line in one.row["rules"]}["code"] == "held"
    place = facts.index(scripts)
    rewrite(copy, [*facts[:place], {**scripts, "train_sha256": OTHER}, *facts[place + 1 :], scripts])
    with pytest.raises(Exception, match="packed by code of other scripts") as caught:
        origin(copy)
    assert "\n" not in str(caught.value)


def test_a_run_that_booked_no_code_of_its_scripts_leaves_the_rule_open(copy):
    changed(copy, "scripts", code_sha256=None)
    line = next(line for line in entry(copy).row["rules"] if line["rule"] == "code")
    assert (line["verdict"], "--check" in line["note"]) == ("open", True)


def test_a_script_of_another_recipe_is_refused(copy, tmp_path, fairway):
    """`fit --code --set` exports the recipe that it fitted."""
    replaced(copy / "recipe.toml", "clip = 1.0\nwarmup", "clip = 0.5\nwarmup")
    assert refused(
        fairway("submit", copy, "-o", tmp_path / "r"), "RecipeError", "train.clip = 1.0, but 0.5 in the run's recipe"
    )


def test_weigh_writes_what_is_missing_and_leaves_what_is_there(copy, tmp_path, fairway):
    score, train = copy / "score.py", copy / "train_gpt.py"
    made, journal = score.read_bytes(), (copy / "journal.jsonl").read_bytes()
    score.unlink()
    with train.open("ab") as file:
        file.write(b"# other\n")
    answer = fairway("weigh", copy, "--json")
    assert json.loads(answer.out)["written"] == ["score.py"]
    assert score.read_bytes() == made
    assert train.read_bytes().endswith(b"# other\n")
    assert (copy / "journal.jsonl").read_bytes() == journal, "nothing is booked anew"
    assert refused(
        fairway("submit", copy, "-o", tmp_path / "r"), "RecipeError", "train_gpt.py: not the script that the run booked"
    )


def test_weigh_does_not_put_another_script_in_the_place_of_one_that_was_booked(copy, fairway):
    (copy / "train_gpt.py").unlink()
    changed(copy, "scripts", train_sha256=OTHER)
    answer = fairway("weigh", copy)
    assert refused(answer, "RecipeError", "train_gpt.py: is missing, and this code makes another script")
    assert not (copy / "train_gpt.py").exists()


def test_weigh_marks_scripts_that_it_made_for_a_run_of_other_code(copy, tmp_path, fairway):
    """A run from before scripts were weighed: its weight is told, but no record takes them for its own."""
    for name in ("train_gpt.py", "score.py"):
        (copy / name).unlink()
    changed(copy, "code", sha256=OTHER)
    rewrite(copy, [fact for fact in facts_of(copy) if fact["fact"] != "scripts"])
    assert "written now, by other code than the run's" in fairway("weigh", copy).out
    assert refused(fairway("submit", copy, "-o", tmp_path / "r"), "RecipeError", f"trained by {OTHER[:12]}")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("score.json", b'{"result": "adap', "not the journal of a finished run ("),
        ("score.json", b'{"result": "adapted"}', "(no 'bits_per_byte')"),
        ("score.json", b"[]", "not the journal of a finished run ("),
        ("journal.jsonl", b"", "(no 'scripts')"),
        ("curves.jsonl", b'{"curve": "train", "loss": 1}\n', "(no 'step')"),
        ("curves.jsonl", b'{"curve": "train", "step": [], "loss": 1}\n', "not the journal of a finished run ("),
    ],
)
def test_a_damaged_run_is_one_line(copy, tmp_path, fairway, name, content, says):
    (copy / name).write_bytes(content)
    assert refused(fairway("submit", copy, "-o", tmp_path / "record"), "DataError", str(copy), says)
    assert not (tmp_path / "record").exists()


def test_a_run_without_its_calibration_is_one_line(copy, tmp_path, fairway):
    rewrite(copy, [fact for fact in facts_of(copy) if fact["fact"] != "calibration"])
    assert refused(fairway("submit", copy, "-o", tmp_path / "record"), "DataError", "(no 'calibration')")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda record: record["runs"][0].pop("seed"), "no 'seed'"),
        (lambda record: record["runs"][0].pop("run"), "no 'run'"),
        (lambda record: record["runs"][0].update(run="../tiny-1"), "no folder's name"),
        (lambda record: record["runs"][0].pop("val_loss"), "no 'val_loss'"),
        (lambda record: record["runs"][0].update(val_bpb="low"), "no record of `fairway submit`"),
        (lambda record: record["runs"][0]["sha256"].update(script=None), "a hash is no text"),
        (lambda record: record.pop("recipe"), "no 'recipe'"),
        (lambda record: record["runs"].clear(), "no record of `fairway submit`"),
    ],
)
def test_a_damaged_record_is_one_line(standing, two_runs, tmp_path, change, says):
    folder = shutil.copytree(standing, tmp_path / "record")
    record = json.loads((folder / "submission.json").read_text())
    assert load(folder) == record
    change(record)
    (folder / "submission.json").write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        submit([two_runs / "tiny-1"], folder, update=True)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["README.md", "train_seed2.log"])
def test_an_update_names_the_file_that_it_cannot_read(standing, two_runs, tmp_path, fairway, name):
    folder = shutil.copytree(standing, tmp_path / "record")
    (folder / name).unlink()
    answer = fairway("submit", two_runs / "tiny-1", "--update", folder)
    assert refused(answer, "DataError", f"{folder / name}: No such file or directory")


def test_a_readme_that_is_no_utf8_is_one_line(standing, two_runs, tmp_path, fairway):
    folder = shutil.copytree(standing, tmp_path / "record")
    readme = folder / "README.md"
    readme.write_bytes(readme.read_text().encode("utf-16"))
    assert refused(fairway("submit", two_runs / "tiny-1", "--update", folder), "DataError", "README.md: no UTF-8 text")


@pytest.mark.parametrize("bar", ["nan", "0", "-3", "inf"])
def test_a_bar_that_no_score_can_beat_is_refused(two_runs, tmp_path, fairway, bar):
    answer = fairway("submit", two_runs / "tiny-1", "-o", tmp_path / "record", "--bar", bar)
    assert refused(answer, "RecipeError", f"--bar {bar}: ")


def verdicts(one, **facts):
    """The rules of a run with some facts changed, by name."""
    table = deepcopy(one.facts)
    for name, values in facts.items():
        table[name] |= values
    return {line.rule: line.verdict for line in rules(one.recipe, table, origin(one.folder))}


def test_verdicts_follow_the_facts(two_runs):
    """Limits may be reached, as the official rules have it; what a fact contradicts is broken, whatever is promised."""
    one = entry(two_runs / "tiny-1")
    held = verdicts(one)
    assert {held[rule] for rule in ("size", "training time", "scoring time", "bytes", "one pass", "code")} == {"held"}
    room = 16_000_000 - one.facts["scripts"]["train_bytes"]
    assert verdicts(one, artifact={"bytes": room})["size"] == "held"
    assert verdicts(one, artifact={"bytes": room + 1})["size"] == "broken"
    assert verdicts(one, score_adapted={"seconds": 600.1})["scoring time"] == "broken"
    spent = {"seconds": 590.0, "writing_seconds": 4.0}
    assert verdicts(one, train=spent, calibration={"seconds": 6.1})["training time"] == "broken"
    assert verdicts(one, train=spent, calibration={"seconds": 6.0})["training time"] == "held"
    tokens = one.facts["score_adapted"]["tokens"]
    for other in (tokens - 1, tokens + 1):
        assert verdicts(one, score_adapted={"tokens": other})["one pass"] == "broken"
    assert verdicts(one, score_adapted={"text_bytes": one.row["text_bytes"] + 1})["bytes"] == "broken"
    assert verdicts(one, score_adapted={"text_sha256": OTHER})["bytes"] == "broken"
    assert verdicts(one, score_adapted={"decoded": True})["bytes"] == "open"
