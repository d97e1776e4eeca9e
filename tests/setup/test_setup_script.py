"""scripts/setup.py decides rightly what to install, when to stop, and what to say."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fairway_setup_script", ROOT / "scripts" / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*names: str) -> dict:
    """The part of pip's dry-run report that matters (report format version 1)."""
    return {
        "version": "1",
        "install": [{"metadata": {"name": name, "version": "2.13.0" if name == "torch" else "1.0"}} for name in names],
    }


CPU = ("torch", "numpy", "sympy", "fairway")
CUDA = ("torch", "numpy", "nvidia-cublas", "nvidia-nccl-cu13", "cuda-toolkit", "cuda-bindings", "triton", "fairway")


def test_cuda_packages_are_told_from_others_by_name(setup: ModuleType) -> None:
    assert setup.cuda_packages([*CUDA, "pytorch-triton"]) == [
        "cuda-bindings",
        "cuda-toolkit",
        "nvidia-cublas",
        "nvidia-nccl-cu13",
        "pytorch-triton",
        "triton",
    ]
    assert setup.cuda_packages([*CPU, "barracuda", "tritonclient"]) == []


@pytest.mark.parametrize(
    ("system", "driver", "names", "consent", "stops"),
    [
        ("linux", False, CUDA, False, True),
        ("linux", True, CUDA, False, False),  # a GPU box wants CUDA
        ("linux", False, CPU, False, False),
        ("linux", False, CUDA, True, False),  # asked for with --cuda
        ("darwin", False, CPU, False, False),
        ("win32", False, CPU, False, False),
    ],
)
def test_only_linux_without_a_driver_is_asked_before_cuda_is_fetched(
    setup: ModuleType, system: str, driver: bool, names: tuple[str, ...], consent: bool, stops: bool
) -> None:
    line = setup.needs_consent(system, driver, list(setup.packages(report(*names))), consent, "2.13.0")
    assert bool(line) is stops


def test_the_stop_names_the_exact_command_for_a_cpu_build(setup: ModuleType) -> None:
    line = setup.needs_consent("linux", False, list(CUDA), False, setup.pinned("# a comment\ntorch==2.13.0; x\n"))
    assert "5 CUDA packages" in line
    assert f"-m pip install torch==2.13.0 --index-url {setup.TORCH_INDEX} && make setup" in line
    assert "make setup SETUP=--cuda" in line


def test_the_constraints_pin_torch_on_linux_only(setup: ModuleType) -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert setup.pinned(text).count(".") == 2
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    assert all('sys_platform == "linux"' in line for line in pins)


def test_a_driver_is_found_by_what_the_kernel_shows(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert not setup.nvidia_driver(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert setup.nvidia_driver(tmp_path)


def test_old_pythons_are_refused_in_one_line(setup: ModuleType) -> None:
    for version in ((3, 6), (3, 10), (2, 7)):
        line = setup.too_old(version)
        assert f"Python {version[0]}.{version[1]} is too old" in line
        assert "\n" not in line
    assert setup.too_old((3, 11)) == setup.too_old((3, 14)) == ""


def test_the_script_can_be_read_by_python_3_6() -> None:
    ast.parse((ROOT / "scripts" / "setup.py").read_text(), feature_version=(3, 6))


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("WARNING: Retrying ... NewConnectionError(': Failed to establish')", "package index cannot be reached"),
        ("[Errno -3] Temporary failure in name resolution", "package index cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of torch==2.13.0"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "the disk is full"),
        ("noise\nERROR: Cannot do this\n", "pip: Cannot do this"),
        ("", "pip: failed without a word"),
    ],
)
def test_what_pip_prints_becomes_one_line(setup: ModuleType, printed: str, said: str) -> None:
    assert said in setup.explain(printed)
    assert "\n" not in setup.explain(printed)


def test_a_missing_venv_module_is_one_line_with_the_remedy(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "PYTHON", tmp_path / "absent")
    monkeypatch.setattr(setup, "quiet", lambda command: (1, "The virtual environment ... ensurepip is not available"))
    with pytest.raises(setup.Refusal, match=r"no venv module; .*apt install python3\.\d+-venv"):
        setup.make_venv()


def test_the_stamp_changes_with_each_thing_the_environment_is_made_from(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    names = ("pyproject.toml", "constraints.txt", "scripts/setup.py")
    for name in names:
        (tmp_path / name).write_text(name)
    seen = {setup.key(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("changed")
        seen.add(setup.key(tmp_path))
    assert len(seen) == 4


def test_a_half_made_environment_is_not_ready(setup: ModuleType, tmp_path: Path) -> None:
    python, stamp = tmp_path / "python", tmp_path / "stamp"
    python.touch()
    assert not setup.is_ready(stamp, python, "k")
    stamp.write_text("other")
    assert not setup.is_ready(stamp, python, "k")
    stamp.write_text("k")
    assert setup.is_ready(stamp, python, "k")
    python.unlink()
    assert not setup.is_ready(stamp, python, "k")


def test_a_package_cut_short_is_not_taken_for_whole(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / ("Lib" if sys.platform == "win32" else "lib/python3.11") / "site-packages"
    for name, whole in (("torch-2.13.0+cpu", False), ("numpy-2.4.6", True)):
        (site / f"{name}.dist-info").mkdir(parents=True)
        (site / f"{name}.dist-info" / ("RECORD" if whole else "METADATA")).touch()
    monkeypatch.setattr(setup, "VENV", tmp_path)
    assert setup.torch_version() == "2.13.0+cpu"
    setup.sweep()
    assert setup.torch_version() is None
    assert (site / "numpy-2.4.6.dist-info").exists()


@pytest.mark.parametrize(
    ("torch", "index", "uv", "uv_works", "expected"),
    [
        (None, True, "/bin/uv", True, ["uv"]),
        (None, True, "/bin/uv", False, ["uv", "pip"]),  # said aloud, then pip goes on
        (None, True, None, False, ["pip"]),
        (None, False, "/bin/uv", True, ["pip"]),
        ("2.13.0+cpu", True, "/bin/uv", True, ["pip"]),  # a build chosen by hand stays
    ],
)
def test_uv_installs_where_pytorchs_index_is_reachable_and_else_pip(
    setup: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch: str | None,
    index: bool,
    uv: str | None,
    uv_works: bool,
    expected: list[str],
) -> None:
    called: list[str] = []
    monkeypatch.setattr(sys, "argv", ["setup.py"])
    monkeypatch.setattr(setup, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(setup, "make_venv", lambda: None)
    monkeypatch.setattr(setup, "sweep", lambda: None)
    monkeypatch.setattr(setup, "torch_version", lambda: torch)
    monkeypatch.setattr(setup, "reachable", lambda url: index)
    monkeypatch.setattr(setup, "find_uv", lambda: uv)
    monkeypatch.setattr(setup, "install_with_uv", lambda uv: called.append("uv") or uv_works)
    monkeypatch.setattr(setup, "install_with_pip", lambda consent: called.append("pip"))
    monkeypatch.chdir(tmp_path)
    for name in ("PIP_DISABLE_PIP_VERSION_CHECK", "PIP_NO_INPUT"):
        monkeypatch.setenv(name, "1")  # main sets them; the test takes them back
    setup.main()
    assert called == expected
    assert (tmp_path / "stamp").read_text() == setup.key(ROOT)


def test_make_knows_every_target_of_the_readme() -> None:
    for target in ("setup", "run", "test", "lint", "clean"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
