"Delivery as a pipeline: real stages register, upload and cleanup behind small stand-ins of the stages before them."

import json
import os
import shutil
from pathlib import Path

import pytest
from garden import Garden, write_notebook
from ollama_server import OllamaServer
from transformers import AutoTokenizer

from so8t.flow import disk
from so8t.model.base import TEMPLATE
from so8t.ship import cleanup, gguf

CRON = os.name != "nt" and not Path("/run/systemd/system").is_dir()
STAGES = Path(__file__).parents[1] / "nbs" / "stages"
CONFIG = """name: garden
stages: [base, collect, cleanse, sft, integrate, register, upload, cleanup]
automation: {retries: 0}
resources: {free_disk: 1 MB}
ollama: {host: HOST, name: tiny}
upload: {folder: shipped}
custom: {base: {model: MODEL}}
"""
BASE = """import shutil
from so8t.flow import disk
known = {"name": "tiny", "source": "built by a test", "licence": "MIT", "revision": "0", "parameters": 1}
with stage.publish() as folder:
    shutil.copytree(stage.config.custom.base["model"], folder, dirs_exist_ok=True)
    (folder / "model-q8_0.gguf").unlink()
    disk.write_json(folder / "base.json", known)"""
COLLECT = """from so8t.flow import disk
with stage.publish() as folder:
    disk.write_json(folder / "sources.json", [{"source": "own", "notice": None}])"""
CLEANSE = """from so8t.data.row import check_row, write_parquet
row = {"id": "a", "lang": "en", "area": "everyday", "verdict": "ALLOW", "prompt": "How do I boil an egg?"}
with stage.publish() as folder:
    write_parquet(folder / "train.parquet", [check_row(row | {"source": "own", "licence": "Apache-2.0"}, "here")])"""
SFT = """from so8t.flow import disk
for step, kind in ((1, "rolling"), (2, "rolling"), (3, "final")):
    with disk.publish(stage.checkpoints / f"{step:08}-{kind}", kind=kind, step=step) as folder:
        (folder / "tensors.safetensors").write_bytes(bytes(100_000))
with stage.publish() as folder:
    (folder / "adapter.safetensors").write_text("adapter")"""
INTEGRATE = """import shutil
from so8t.flow import disk
file = {"file": "model-q8_0.gguf", "tokens": 8, "identical": False, "kl": 0.01, "kl_max": 0.02, "judged": 0,
        "agreement": None, "accuracy": None}
with stage.publish(name="tiny-so8t", final="B", merge_error={"B": 0.0}) as folder:
    shutil.copytree(stage.config.custom.base["model"], folder / "B")
    (folder / "B" / "model-q8_0.gguf").rename(folder / "model-q8_0.gguf")
    disk.write_json(folder / "parity.json", {"final": "B", "merge": {"B": {"merge_error": 0.0}}, "files": [file]})"""
CRONTAB = """#!/bin/sh
[ "$1" = -l ] && exec cat "{table}"
cat > "{table}.new" && mv "{table}.new" "{table}"
"""


@pytest.fixture(scope="module")
def model(base, tmp_path_factory) -> Path:
    "A model with a chat template of turns, and its GGUF file beside it."
    folder = tmp_path_factory.mktemp("delivery") / "model"
    shutil.copytree(base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    gguf.convert(folder, folder / "model-q8_0.gguf", "q8_0", "tiny")
    return folder


@pytest.fixture(scope="module")
def delivered(model, tmp_path_factory):
    "The workspace after a run, Ollama as it was left, and what the command said."
    room = tmp_path_factory.mktemp("delivered")
    garden, table = Garden(room / "work"), room / "table"
    for name, source, reads in (("base", BASE, []), ("collect", COLLECT, []), ("cleanse", CLEANSE, ["collect"]),
                                ("sft", SFT, ["base", "cleanse"]), ("integrate", INTEGRATE, ["base", "sft"])):
        write_notebook(garden.root, name, reads, ["custom.base"] if name in ("base", "integrate") else ["name"], source)
    for name in ("register", "upload", "cleanup"):
        shutil.copy(STAGES / f"{name}.ipynb", garden.root / "stages")
    (room / "bin").mkdir()
    (room / "bin" / "crontab").write_text(CRONTAB.format(table=table))
    (room / "bin" / "crontab").chmod(0o755)
    table.write_text("0 3 * * * backup\n")
    with pytest.MonkeyPatch.context() as patch, OllamaServer() as ollama:
        patch.setenv("PATH", f"{room / 'bin'}:{os.environ['PATH']}")
        garden.config.write_text(CONFIG.replace("HOST", ollama.host).replace("MODEL", str(model)), encoding="utf-8")
        if CRON:
            assert garden.so8t("schedule", "install").returncode == 0
            assert len(table.read_text().splitlines()) == 2
        done = garden.so8t("run")
        assert done.returncode == 0, done.stdout + done.stderr
        yield garden, ollama, done.stdout, table


def run_of(garden) -> Path:
    return max(garden.runs.glob("garden-*/events.jsonl")).parent


def artifact(garden, stage: str) -> Path:
    return next(run_of(garden).glob(f"artifacts/{stage}/*/manifest.json")).parent


def test_both_models_are_in_ollama_under_one_template(delivered):
    garden, ollama, _, _ = delivered
    assert set(ollama.models) == {"tiny:a", "tiny:b"}
    a, b = ollama.models.values()
    assert a["template"] == b["template"] and a["parameters"] == b["parameters"] and a["parameters"]["stop"]
    record = disk.read_json(artifact(garden, "register") / "register.json")
    there = {name: found["digest"] for name, found in ollama.models.items()}
    assert {row["name"]: row["digest"] for row in record["models"]} == there


def test_the_model_is_in_the_folder_with_its_card(delivered):
    garden, _, _, _ = delivered
    shipped = garden.root / "shipped" / "tiny-so8t"
    assert disk.verify(shipped) == []
    known = disk.read_json(shipped / "metadata.json")
    assert known["session"] == run_of(garden).name and {"base", "cleanse", "integrate"} <= set(known["digests"])
    for name, file in known["files"].items():
        assert disk.sync_file(shipped / name) == file, name
    card = (shipped / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation\n\nNot run." in card and "license: mit" in card and "| own | 1 | Apache-2.0 |" in card
    AutoTokenizer.from_pretrained(shipped)
    assert gguf.stated_loss(shipped / "model-q8_0.gguf").keys() == set(gguf.LOSS.values())


def test_only_the_final_checkpoint_is_left_and_nothing_runs_again(delivered):
    garden, _, _, _ = delivered
    run = run_of(garden)
    assert [path.name for path in sorted((run / "checkpoints" / "sft").glob("0*"))] == ["00000003-final"]
    said = disk.read_json(artifact(garden, "cleanup") / "cleanup.json")
    assert said["before"] - said["after"] == said["freed"] > 200_000
    assert cleanup.plan(run) == [] and not list(run.glob(".staging-*"))
    assert set(garden.plan().values()) <= {"skip", "reuse"}
    assert "nothing has changed" in garden.so8t("run").stdout and len(list(garden.runs.glob("garden-*"))) == 1
    assert garden.so8t("verify").returncode == 0


@pytest.mark.skipif(not CRON, reason="another scheduler comes first, and it is not to be touched")
def test_the_scheduled_task_is_gone_and_the_others_are_not(delivered):
    _, _, said, table = delivered
    assert "removed from the scheduler" in said and table.read_text() == "0 3 * * * backup\n"


def test_links_strangers_and_other_trainings_stay(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"

    def bundle(folder, step, kind):
        with disk.publish(folder / f"{step:08}-{kind}", kind=kind, step=step) as staging:
            (staging / "tensors").write_bytes(bytes(10))

    for home in (run / "checkpoints" / "sft", run / "checkpoints" / "ppo", outside):
        bundle(home, 1, "rolling")
        bundle(home, 2, "final")
    for stage in ("sft", "linked"):
        with disk.publish(run / "artifacts" / stage / ("a" * 12)):
            pass
    (run / "checkpoints" / "linked").symlink_to(outside)
    stranger = run / "checkpoints" / "sft" / "00000000-final"
    stranger.mkdir()
    (stranger / "manifest.json").write_text(json.dumps({"format": 1, "kind": "final", "step": 0}))
    (run / ".tmp-session.json-0a1b2c3d").write_text("the runner is writing")
    (run / "artifacts" / ".tmp-x-0a1b2c3d").write_text("half")
    (run / "artifacts" / ".tmp-mine").write_text("a person's")
    found = [left.path.relative_to(run).as_posix() for left in cleanup.plan(run)]
    assert found == ["checkpoints/sft/00000001-rolling", "artifacts/.tmp-x-0a1b2c3d"]
    cleanup.apply(run, cleanup.plan(run))
    assert len(list(outside.iterdir())) == 2 and stranger.is_dir() and (run / "artifacts" / ".tmp-mine").is_file()
