"Preflight, measurements, the lock of a GPU, and old runs: on real runs, real servers and real model shapes."

import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from garden import Garden, wait_for

from so8t.flow import config as configs
from so8t.ops import doctor, estimate, gpu

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def garden(tmp_path) -> Garden:
    return Garden(tmp_path)


def config_with(**sections) -> configs.Config:
    return configs.Config(name="a", **{"stages": ["base", "sft", "ppo", "integrate"], **sections})


# ---- the doctor ----


class Nvml(Exception):
    """What of NVIDIA's library is asked, as its reference says: bytes, percent, °C, mW; NVMLError where a sensor is not
    supported. A stand-in: there is no card on the machine that runs the tests."""

    NVMLError, NVML_TEMPERATURE_GPU = RuntimeError, 0

    def __init__(self, total: float, used: float, power: float | None):
        self.total, self.used, self.power = int(total), int(used), power

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return "a card"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=self.total, used=self.used, free=self.total - self.used)

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=97, memory=40)

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 71

    def nvmlDeviceGetPowerUsage(self, handle):
        if self.power is None:
            raise RuntimeError("Not Supported")
        return self.power * 1000


def with_card(monkeypatch, total=24e9, used=1e9, power=None):
    monkeypatch.setattr(gpu, "nvml", lambda: Nvml(total, used, power))


def test_an_absent_sensor_is_absent(monkeypatch):
    with_card(monkeypatch)
    assert "power" not in gpu.cards()[0] and gpu.cards()[0]["temperature"] == 71
    with_card(monkeypatch, power=350)
    assert gpu.cards()[0]["power"] == 350


@pytest.mark.parametrize("total, used, status", [(24e9, 1e9, "fine"), (24e9, 20e9, "warn"), (6e9, 0, "abort")])
def test_a_training_that_does_not_fit_is_refused(monkeypatch, total, used, status):
    with_card(monkeypatch, total, used)
    found = doctor.gpu(config_with(), 7 * 10**9)
    assert found.status == status and ("7.0 GB are estimated" in found.advice) == (status != "fine")


def test_no_card_aborts_only_where_one_is_demanded():
    by = {d: doctor.gpu(config_with(resources={"device": d}), None).status for d in ("cpu", "auto", "cuda")}
    assert by == {"cpu": "fine", "auto": "warn", "cuda": "abort"}


@pytest.fixture
def hub(monkeypatch):
    "A server in the place of the hub; `answers` maps paths to what it answers."
    answers, asked = {}, []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(answers.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield SimpleNamespace(answers=answers, asked=asked, server=server)
    server.shutdown()


@pytest.mark.parametrize("code, status", [(200, "fine"), *((code, "abort") for code in (401, 403, 404, 503))])
def test_the_hub_is_asked_for_a_base_model_that_is_not_here(hub, monkeypatch, tmp_path, code, status):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    hub.answers["/api/models/owner/model"] = code
    found = doctor.hub(config_with(model={"base": "owner/model"}))
    assert found.status == status and str(code) in found.found and "hf_me" not in found.found + found.advice
    assert hub.asked == [("/api/models/owner/model", "Bearer hf_me")]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in doctor.hub(config_with(model={"base": "owner/model"})).found
    assert doctor.hub(config_with()).found.startswith("not needed")
    snapshot = tmp_path / "models--owner--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(estimate.SMOLLM2))
    assert doctor.hub(config_with(model={"base": "owner/model"})).status == "fine" and len(hub.asked) == 1


def test_a_hub_that_does_not_answer_is_no_model(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = doctor.hub(config_with(model={"base": "owner/model"}))
    assert found.status == "abort" and found.advice == "look at the network"


def test_ollama_is_asked_where_a_stage_needs_it(hub):
    host = os.environ["HF_ENDPOINT"]
    needed = {"stages": ["base", "register"], "ollama": {"host": host, "required": True}}
    assert doctor.ollama(config_with(**needed)).status == "abort"
    hub.answers["/api/version"] = 200
    assert doctor.ollama(config_with(**needed)).status == "fine"
    assert doctor.ollama(config_with()).found == "not needed"


def test_a_clock_that_was_set_back_is_seen(tmp_path):
    runs = tmp_path / "runs" / "a-1"
    runs.mkdir(parents=True)
    (runs / "events.jsonl").touch()
    workspace = SimpleNamespace(runs=runs.parent)
    assert doctor.clock(workspace).status == "fine"
    os.utime(runs / "events.jsonl", (time.time() + 7200,) * 2)
    assert doctor.clock(workspace).status == "warn" and "2.0 h before" in doctor.clock(workspace).advice


# ---- estimates ----


@pytest.mark.parametrize("kind", ["phi3", "llama"])
def test_parameters_are_counted_to_the_last_one(kind, base):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

    sizes = dict(vocab_size=500, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
                 num_key_value_heads=2, tie_word_embeddings=kind == "llama", pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config((Phi3Config if kind == "phi3" else LlamaConfig)(**sizes))
    size = estimate.size_of(model.config.to_dict())
    assert size.all == sum(p.numel() for p in model.parameters())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    assert size.sides == sum(m.in_features + m.out_features for m in linears)
    assert size.linears == sum(m.weight.numel() for m in linears)
    here = estimate.shape_of(configs.Model(base=str(base)))
    assert estimate.size_of(here).all * 4 < (base / "model.safetensors").stat().st_size * 1.02


def test_a_checkpoint_is_as_large_as_estimated(base, tmp_path):
    from so8t.train import checkpoint, sft

    settings = configs.Sft(lora={"rank": 64})
    rows = [{"prompt": "boil an egg", "verdict": "ALLOW", "lang": "en", "answer": "", "quad": ""}] * 8
    work = sft.Training(base, rows, settings, "cpu", 0)
    work.unit()
    keeper = checkpoint.Checkpointer(tmp_path, {})
    keeper.save(1, {"work": work.state()}, "final")
    shape = estimate.shape_of(configs.Model(base=str(base)))
    config = config_with(training={"sft": {"lora": {"rank": 64}}}, stages=["sft"])
    told = next(n.bytes for n in estimate.needs(config, shape) if "checkpoints" in n.what) / 6
    real = next(tmp_path.glob("*/tensors.safetensors")).stat().st_size
    assert 0.95 < told / real < 1.05


# ---- a run that is measured ----


@posix
def test_a_run_is_refused_measured_shown_and_told_to_prometheus(garden):
    garden.config.write_text(garden.config.read_text().replace("1 MB}", "1 MB, device: cuda}") +
                             "logging: {sample_seconds: 0.1, progress_log_seconds: 0.2}\n", encoding="utf-8")
    refused = garden.so8t("run")
    assert refused.returncode == 2 and "so8t: GPU: none found" in refused.stderr
    preflight = garden.so8t("doctor", "--json")
    assert preflight.returncode == 2
    assert {c["name"]: c["status"] for c in json.loads(preflight.stdout)}["GPU"] == "abort"
    garden.drought()
    first = garden.start("run", "--anyway")
    garden.pids()
    other = garden.config.read_text().replace("name: garden", "name: other")
    (garden.root / "configs" / "other.yaml").write_text(other)
    second = garden.so8t("run", "other", "--anyway", "--no-wait")
    assert second.returncode == 2 and re.search(r"GPU 0 is used by garden-\S+; without --no-wait", second.stderr)
    waiting = garden.start("run", "other", "--anyway", "--until", "seed")
    wait_for(lambda: "waits for GPU 0, which garden-" in (garden.root / "out.txt").read_text())
    run = next(garden.runs.glob("garden-*"))
    text = garden.so8t("status", run.name, "--prometheus").stdout
    gauge = re.compile(r'so8t_[a-z_]+\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\} [-+.e0-9]+')
    assert all(line.startswith("# TYPE so8t_") or gauge.fullmatch(line) for line in text.splitlines())
    assert f'so8t_run_running{{run="{run.name}"}} 1' in text
    memory = float(re.search(r"^so8t_memory_total_bytes\S* (\S+)", text, re.MULTILINE)[1])
    assert memory == pytest.approx(psutil.virtual_memory().total, rel=1e-4) and "gpu" not in text
    assert "memory" in garden.so8t("status", run.name).stdout
    garden.rain()
    assert first.wait(60) == 0 and waiting.wait(60) == 0
    rows = [json.loads(line) for line in (run / "metrics" / "system.jsonl").read_text().splitlines()]
    assert len(rows) > 5 and rows[0]["gpus"] == [] and all(row["cpu"] >= 0 for row in rows)


# ---- runs side by side, and old ones ----


def test_old_runs_go_and_the_newest_stays(garden):
    text = garden.config.read_text().replace("retries: 1", "retries: 1, session_expires_after: 0.1")
    garden.config.write_text(text.replace("[seed, grow, pick]", "[seed]"), encoding="utf-8")
    for _ in range(2):
        assert garden.so8t("run", "--new", "--no-reuse").returncode == 0
    older, newest = (p.name for p in sorted(garden.runs.glob("garden-*")))
    rehearsal = garden.so8t("clean", "--dry-run").stdout
    assert f"would go: {older}" in rehearsal and f"stays: {newest}: is the newest of its pipeline" in rehearsal
    assert len(list(garden.runs.glob("garden-*"))) == 2
    assert f"removed: {older}" in garden.so8t("clean").stdout
    left, = json.loads(garden.so8t("list", "--json").stdout)
    assert left["id"] == newest and left["expires"]


def test_checkpoints_alone_are_verified(garden):
    from so8t.flow import disk

    assert garden.so8t("run", "--until", "seed").returncode == 0
    run = next(garden.runs.glob("garden-*"))
    for step in (1, 2):
        with disk.publish(run / "checkpoints" / "grow" / f"{step:08d}-rolling", kind="rolling", step=step) as folder:
            (folder / "state.json").write_text("{}")
    next(run.glob("artifacts/seed/*/result.txt")).write_text("gnawed")
    assert garden.so8t("verify", "--checkpoints").returncode == 0 and garden.so8t("verify").returncode == 3
    (run / "checkpoints" / "grow" / "00000002-rolling" / "state.json").write_text("[]")
    found = garden.so8t("verify", "--checkpoints")
    assert found.returncode == 3 and "2 folders hashed, 1 damaged" in found.stdout
    assert "00000002-rolling" in found.stdout


def test_nothing_here_needs_torch():
    for name in Path(doctor.__file__).parent.glob("*.py"):
        assert "import torch" not in name.read_text(encoding="utf-8")
