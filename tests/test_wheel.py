"A wheel, alone in another place, makes a workspace that works."

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "MANIFEST.in", "settings.ini", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("configs", "nbs/stages", "so8t")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    "A wheel, built from a copy of the sources by way of an sdist, and unpacked as pip would."
    source, out, site = (tmp_path_factory.mktemp(name) for name in ("source", "out", "site"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    return site


def so8t(site: Path, folder: Path, *words) -> subprocess.CompletedProcess:
    "The command of the unpacked wheel, in a folder."
    env = {k: v for k, v in os.environ.items() if k != "SO8T_WORKSPACE"} | {"PYTHONPATH": str(site), "COLUMNS": "160"}
    code = "import sys, so8t.cli; assert so8t.__file__.startswith(sys.argv.pop(1)); so8t.cli.main()"
    command = [sys.executable, "-c", code, site, *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def workspace(unpacked, tmp_path) -> Path:
    made = so8t(unpacked, tmp_path, "init", "mine")
    assert made.returncode == 0, made.stderr
    return tmp_path / "mine"


def test_the_workspace_of_a_wheel_plans_every_pipeline(unpacked, workspace):
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        shown = so8t(unpacked, workspace, "run", f"configs/{config.name}", "--dry-run", "--json")
        assert shown.returncode == 0, shown.stderr
        assert {row["action"] for row in json.loads(shown.stdout)["stages"]} == {"run"}


def test_it_holds_what_the_repository_holds(workspace):
    held = {p.relative_to(workspace).as_posix() for p in workspace.rglob("*") if p.is_file()}
    kept = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("nbs/stages/*.ipynb")]
    ours = {p.relative_to(ROOT).as_posix() for p in kept}
    assert held == ours | {".gitignore", "settings.ini"}
    assert all((workspace / name).read_bytes() == (ROOT / name).read_bytes() for name in ours)


def test_init_changes_no_workspace(unpacked, workspace):
    (workspace / "configs" / "tiny.yaml").unlink()
    again = so8t(unpacked, workspace, "init")
    assert (again.returncode, again.stdout) == (0, ".: is a workspace already; nothing was changed\n")
    assert not (workspace / "configs" / "tiny.yaml").exists()


def test_init_leaves_another_project_alone(unpacked, tmp_path):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n", encoding="utf-8")
    refused = so8t(unpacked, tmp_path, "init")
    assert refused.returncode == 2 and "name another folder" in refused.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["settings.ini"]


@pytest.mark.soak
def test_the_tiny_pipeline_runs_from_a_wheel(unpacked, workspace):
    done = so8t(unpacked, workspace, "run", "configs/tiny.yaml")
    assert done.returncode == 0, done.stderr
    seen = json.loads(so8t(unpacked, workspace, "status", "--json").stdout)
    assert seen["status"] == "completed"
    assert (workspace / "runs" / seen["id"] / "code" / "so8t" / "flow" / "runner.py").is_file()
