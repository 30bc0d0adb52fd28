"The house stands as drawn: rooms import downward only, and notebooks and library say the same."

import ast
import configparser
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOUNDATION = {"flow.disk", "flow.config", "flow.problem", "flow.words"}
MAY_IMPORT = {
    "cli": {"cli", "ops", "serve", "flow", "eval.regression"},
    "ops": {"ops", "flow"},
    "flow": {"flow"},
    "data": {"data"},
    "model": {"model", "data"},
    "train": {"train", "model", "data"},
    "eval": {"eval", "train", "model", "data"},
    "ship": {"ship", "train", "model", "data"},
    "serve": {"serve", "train", "model", "data"},
    "stages": {"serve", "ship", "eval", "train", "model", "data", "flow.stage"},
}
HEAVY = {"torch", "transformers", "peft", "datasets", "matplotlib", "sklearn", "statsmodels"}


def imported(source: str, module: str) -> set[str]:
    "Dotted names that a source imports, relative ones resolved."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level] + [node.module or ""]) if node.level else node.module
            found |= {f"{base.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[tuple[str, str]]:
    "(dotted module, source) of the library, and (stages.<name>, code) of the stage notebooks."
    library = [(p, ".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in sorted((ROOT / "so8t").rglob("*.py"))]
    found = [(name, p.read_text(encoding="utf-8")) for p, name in library]
    for p in sorted((ROOT / "nbs" / "stages").glob("*.ipynb")):
        cells = [c for c in json.loads(p.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        found.append((f"stages.{p.stem}", "\n".join("".join(c["source"]) for c in cells)))
    return found


def broken_arrows(sources) -> list[str]:
    "Imports that go up or sideways."
    wrong = []
    for module, source in sources:
        room = module.removeprefix("so8t.").split(".")[0]
        if module.endswith("__init__") or room == "_modidx":
            continue
        for name in imported(source, module):
            if not name.startswith("so8t."):
                continue
            target = name.removeprefix("so8t.")
            allowed = MAY_IMPORT[room] | FOUNDATION
            if not any(target == a or target.startswith(a + ".") for a in allowed):
                wrong.append(f"{module} imports {target}")
    return wrong


def test_rooms_import_downward_only():
    assert broken_arrows(sources()) == []


def test_a_broken_arrow_is_seen():
    assert broken_arrows([("so8t.data.row", "from ..train import sft")]) == ["so8t.data.row imports train.sft"]
    assert broken_arrows([("so8t.model.x", "from so8t.flow import runner")]) == ["so8t.model.x imports flow.runner"]


@pytest.mark.parametrize("room", ["flow", "ops", "cli"])
def test_nothing_heavy_is_imported_below_the_stages(room):
    for module, source in sources():
        if module.removeprefix("so8t.").split(".")[0] == room:
            assert not {n.split(".")[0] for n in imported(source, module)} & HEAVY, module


def test_the_command_starts_without_torch_and_papermill():
    code = "import sys, so8t.cli; print([m for m in ('torch', 'papermill', 'nbformat') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_settings_ini_and_pyproject_say_the_same():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for key, value in project["tool"]["nbdev"].items():
        said = " ".join(value) if isinstance(value, list) else str(value)
        assert settings["DEFAULT"][key] == said, key
    assert settings["DEFAULT"]["version"] == project["project"]["version"]
    assert settings["DEFAULT"]["description"] == project["project"]["description"]


def generated(folder: Path) -> dict[str, bytes]:
    "The Python files below a folder, by relative path."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.py"))}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "The workspace, its notebooks cleaned and its library exported anew, in another place."
    folder = tmp_path_factory.mktemp("export")
    for name in ("nbs", "so8t"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    bin_ = Path(sys.executable).parent
    subprocess.run([bin_ / "nbdev-clean"], cwd=folder, check=True)
    for file in (folder / "so8t").rglob("*.py"):
        if file.name != "__init__.py":
            file.unlink()
    subprocess.run([bin_ / "nbdev-export"], cwd=folder, check=True)
    return folder


def test_the_notebooks_are_clean(copy):
    for notebook in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in notebook.parts:
            cleaned = copy / notebook.relative_to(ROOT)
            assert notebook.read_bytes() == cleaned.read_bytes(), f"{notebook.name}: run nbdev-clean"


def test_the_library_is_what_the_notebooks_export(copy):
    here, there = generated(ROOT / "so8t"), generated(copy / "so8t")
    assert here.keys() == there.keys()
    assert [name for name in here if here[name] != there[name]] == [], "run nbdev-export"


def test_stage_notebooks_keep_their_tags_and_are_thin(copy):
    for notebook in sorted((copy / "nbs" / "stages").glob("*.ipynb")):
        code = [c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
        tags = [t for c in code for t in c["metadata"].get("tags", [])]
        assert tags.count("parameters") == 1 and tags.count("stage") == 1, notebook.name
        assert len(code) <= 12, notebook.name
