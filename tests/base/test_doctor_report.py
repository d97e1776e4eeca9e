"""`fairway doctor` tells what is there and what to do about what is not."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from fairway import doctor


def find(name: str) -> doctor.Check:
    (check,) = [check for check in doctor.report() if check.name == name]
    return check


def test_the_report_is_plain_data_with_one_line_each() -> None:
    checks = doctor.report()
    json.dumps([dataclasses.asdict(check) for check in checks])
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert check.found
        assert "\n" not in check.found + check.remedy
        assert bool(check.remedy) == (check.state != "ok"), check


def test_what_it_says_of_torch_is_what_torch_says() -> None:
    assert find("torch").found == torch.__version__
    assert find("device").found.startswith("cpu") is not torch.cuda.is_available()


def test_every_core_dependency_of_the_project_is_checked() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {line.split(";")[0].split(">")[0].strip() for line in project["dependencies"]}
    assert wanted - {"torch", "backports.zstd"} == set(doctor.CORE)


def test_a_missing_package_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    absent = ("brotli", "matplotlib", "backports.zstd", "compression.zstd")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else real(name))
    assert find("brotli") == doctor.Check("brotli", "missing", "packing, baselines", "pip install brotli")
    assert find("matplotlib").found == "optional: plots in reports"
    assert find("zstd").remedy == "pip install backports.zstd"


def test_a_missing_torch_is_a_finding_not_a_crash() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fairway import doctor\n"
        "print([c for c in doctor.report() if c.name == 'torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "state='missing'" in done.stdout
    assert "remedy='make setup'" in done.stdout


def test_the_commit_is_git_s_own(tmp_path: Path) -> None:
    assert doctor.git_commit(tmp_path) is None
    run = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    subprocess.run(["git", "-C", str(tmp_path), "init", "-q"], check=True)
    (tmp_path / "file").write_text("1")
    subprocess.run([*run, "add", "."], check=True)
    subprocess.run([*run, "commit", "-qm", "one"], check=True)
    head = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert doctor.git_commit(tmp_path) == head[:12]
    (tmp_path / "file").write_text("2")
    assert doctor.git_commit(tmp_path) == head[:12] + "+"
    (tmp_path / "installed").mkdir()  # nothing of it belongs to the checkout around it
    assert doctor.git_commit(tmp_path / "installed") is None
