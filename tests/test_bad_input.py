"Whatever is wrong, the command says it in one clear line that names the place, and breaks nothing."

import os
import shutil
import subprocess

import pytest
from garden import CONFIG, PICK, SEED, Garden, write_notebook


@pytest.fixture
def garden(tmp_path) -> Garden:
    return Garden(tmp_path)


def one_line(done: subprocess.CompletedProcess, code: int, *words: str):
    "One line on stderr with these words, no traceback, this exit code."
    assert done.returncode == code, done.stdout + done.stderr
    said = done.stderr.strip()
    assert said.startswith("so8t: ") and "\n" not in said and "Traceback" not in done.stdout, done.stdout + done.stderr
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: garden\nstagess: [seed]\n", ["configs/garden.yaml", "stagess", "stages"]),
        ("name: garden\ntraining: {sft: {lerning_rate: 1e-5}}\n", ["training.sft.lerning_rate", "learning_rate"]),
        ("name: garden\ntraining: {seed: often}\n", ["training.seed"]),
        ("name: [garden\n", ["configs/garden.yaml"]),
        ("", ["configs/garden.yaml"]),
    ],
)
def test_a_malformed_configuration(garden, text, words):
    garden.config.write_text(text)
    one_line(garden.so8t("run"), 2, *words)
    assert not garden.runs.exists()


def test_a_missing_configuration(garden):
    one_line(garden.so8t("run", "gardn"), 2, "gardn", "garden")
    one_line(garden.so8t("run", "configs/none.yaml"), 2, "configs/none.yaml")


def test_no_workspace(garden, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(garden.command("run"), cwd=elsewhere, env=garden.env, capture_output=True, text=True)
    one_line(done, 2, "settings.ini")


def test_an_unknown_stage(garden):
    garden.config.write_text(CONFIG.replace("[seed, grow, pick]", "[seed, grow, prune]"))
    one_line(garden.so8t("run"), 2, "unknown stage prune", "grow, pick, seed")
    garden.config.write_text(CONFIG)
    one_line(garden.so8t("run", "--force", "prune"), 2, "unknown stage prune", "seed, grow, pick")


def test_a_stage_before_what_it_reads(garden):
    garden.config.write_text(CONFIG.replace("[seed, grow, pick]", "[seed, pick]"))
    one_line(garden.so8t("run"), 2, "stage pick reads grow")


def test_a_notebook_without_parameters(garden):
    write_notebook(garden.root, "seed", [], ["custom.seed"], SEED, tags=("", "stage"))
    one_line(garden.so8t("run"), 2, "seed.ipynb", "exactly one cell tagged `parameters`, has 0")


def test_a_section_that_was_not_declared(garden):
    write_notebook(garden.root, "pick", ["grow"], ["name"], "stage.config.training", PICK)
    assert garden.so8t("run").returncode == 1
    (end,) = garden.events("stage_ended")
    assert "uses `training` of the configuration without declaring it" in end["error"]
    assert len(garden.events("stage_started")) == 3, "a Problem is not tried again"


def test_an_unknown_run(garden):
    one_line(garden.so8t("status", "garden-1"), 2, "no run garden-1")
    one_line(garden.so8t("status"), 2, "no run")
    one_line(garden.so8t("report"), 2, "no run")


def test_a_run_of_a_newer_version(garden):
    assert garden.so8t("run", "--until", "seed").returncode == 0
    frozen = next(garden.runs.glob("*/config.yaml"))
    text = frozen.read_text(encoding="utf-8")
    frozen.write_text(text.replace("format: 1", "format: 99"), encoding="utf-8")
    assert frozen.read_text(encoding="utf-8") != text
    one_line(garden.so8t("run"), 2, "newer so8t")


def test_too_little_room_is_said_before_anything_runs(garden):
    done = garden.so8t("run", "--set", "resources.free_disk=900 TB")
    one_line(done, 2, "Disk", "resources.free_disk")
    assert not list(garden.runs.glob("garden-*"))


IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
root_only = pytest.mark.skipif(not IS_ROOT or not shutil.which("mount"), reason="needs root, to mount")


@pytest.fixture
def mounted(garden, request):
    "The runs folder on a file system of its own, with the options of the test."
    garden.runs.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", request.param, "tmpfs", str(garden.runs)]
    if subprocess.run(words, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield garden
    subprocess.run(["umount", "-l", str(garden.runs)], check=True)


@root_only
@pytest.mark.parametrize("mounted", ["ro"], indirect=True)
def test_a_read_only_runs_folder(mounted):
    one_line(mounted.so8t("run"), 2, "Runs folder", str(mounted.runs))


def test_debug_shows_where(garden):
    done = garden.so8t("--debug", "status", "garden-1")
    assert "Traceback" in done.stderr
