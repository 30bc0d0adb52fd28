"Agents as they are: slow, wrong, limited, killed in the middle, and paid for once."

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sentencepiece
import torch
import xllamacpp
from garden import gone, wait_for
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from so8t.data import agents
from so8t.data.row import iter_rows
from so8t.data.verdict import Verdict
from so8t.flow import disk
from so8t.flow.config import Agent, Research
from so8t.flow.problem import Problem
from so8t.model import quad
from so8t.ship import gguf

ROOT = Path(__file__).parents[1]
AGENT = str(Path(__file__).with_name("agent.py"))
QUICK = dict(per_minute=60000, backoff=0.01, timeout=20)


def command(folder: Path, kind: str = "bare", *more: str) -> Agent:
    return Agent(name=kind, command=["{python}", AGENT, str(folder), kind, *more], licence="Apache-2.0")


def harvest(folder: Path, *who: Agent, rows: int = 4, **how) -> agents.Harvest:
    wanted = Research(agents=list(who), rows=rows, **QUICK | how)
    return agents.harvest(agents.questions(wanted), wanted.agents, wanted, folder / "cache", quad.of_row)


def asked(folder: Path) -> list[dict]:
    file = folder / "asked.jsonl"
    return disk.read_jsonl(file) if file.exists() else []


def test_wishes_are_spread():
    few = agents.questions(Research(rows=8))
    assert len({q.topic for q in few}) == 8 and [q.verdict for q in few] == list(Verdict) * 2
    many = agents.questions(Research(topics=["税", "薬", "家"], languages=["ja", "en"], rows=48))
    assert len({agents.prompt_for(q) for q in many}) == 48
    assert sorted({(q.lang, q.number) for q in many}) == [("en", 1), ("en", 2), ("ja", 1), ("ja", 2)]


@pytest.mark.parametrize("kind, read, written, usd", [
    ("claude", 4000, 400, 0.04), ("gemini", 2800, 400, None), ("codex", 2800, 400, None), ("bare", None, None, None)])
def test_each_kind_of_agent_is_understood(tmp_path, kind, read, written, usd):
    found = harvest(tmp_path, command(tmp_path, kind))
    assert [row["verdict"] for row in found.rows] == list(Verdict) and found.refused == []
    assert found.costs() == {kind: {"answers": 4, "rows": 4, "read": read, "written": written, "usd": usd}}
    row = found.rows[0]
    assert (row["labeller"], row["source"], row["licence"]) == (f"agent:{kind}", f"agent:{kind}", "Apache-2.0")
    assert found.cited[row["id"]] == [row["url"]] == ["https://www.example.org/papers"]
    assert quad.parse(quad.render(quad.of_row(row))) == quad.of_row(row)


def test_the_prompt_is_in_no_argument_and_the_command_sees_no_files_of_ours(tmp_path):
    harvest(tmp_path, command(tmp_path))
    by_file = Agent(name="file", command=["{python}", "-c", "import sys; print(open(sys.argv[1]).read())", "{prompt}"])
    assert agents.call_command(by_file, "薬の量は?", 20, threading.Event()).text.strip() == "薬の量は?"
    for call in asked(tmp_path):
        assert "Topic" in call["prompt"] and not any("Topic" in word for word in call["argv"])
        assert set(call["cwd"]) == {"prompt", "schema", "out", "err"}


def test_a_fault_is_tried_again_and_its_secret_is_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", "sk-0123456789")
    (tmp_path / "fault").write_text("limit 2")
    assert len(harvest(tmp_path, command(tmp_path), rows=1, retries=2).rows) == 1 and len(asked(tmp_path)) == 3
    (tmp_path / "fault").write_text("limit")
    with pytest.raises(Problem, match=r"bare failed 3 questions in a row \(exit code 1: error 429.*key \*\*\*\)"):
        harvest(tmp_path, command(tmp_path), rows=9, retries=0, concurrency=1)
    assert len(asked(tmp_path)) <= 8
    assert "0123456789" not in "".join(p.read_text() for p in (tmp_path / "cache").rglob("*.json"))


def test_a_silent_agent_is_killed_with_its_children(tmp_path):
    (tmp_path / "fault").write_text("sleep 1")
    found = harvest(tmp_path, command(tmp_path), rows=2, retries=0, timeout=2, concurrency=1)
    assert len(found.rows) == 1 and found.refused[0]["reason"] == "no answer: no answer within 2 s"
    assert wait_for(lambda: gone(int((tmp_path / "child").read_text()), asked(tmp_path)[0]["pid"]), 10)


@pytest.mark.parametrize("wrong, reason", [
    ("garbage", "Invalid JSON"), ("half", "Invalid JSON"), ("tags", "quad: task must be text without a tag"),
    ("english", "prompt: is not in Japanese"), ("same", "says what another row says")])
def test_what_is_no_row_is_put_aside_with_its_reason_and_is_not_asked_again(tmp_path, wrong, reason):
    (tmp_path / "fault").write_text(f"{wrong} 1" if wrong != "same" else wrong)
    for _ in range(2):
        found = harvest(tmp_path, command(tmp_path), rows=2, concurrency=1)
        assert len(found.rows) == 1 and reason in found.refused[0]["reason"] and found.refused[0]["text"]
    assert len(asked(tmp_path)) == 2
    (tmp_path / "out").mkdir()
    agents.save(tmp_path / "out", found)
    assert [r["reason"] for r in disk.read_jsonl(tmp_path / "out" / "quarantine.jsonl")] == [found.refused[0]["reason"]]
    assert list(iter_rows([tmp_path / "out" / "rows-00000.parquet"])) == found.rows


def test_nothing_but_garbage_is_a_problem(tmp_path):
    (tmp_path / "fault").write_text("garbage")
    with pytest.raises(Problem, match="of 2 answers none is a row"):
        harvest(tmp_path, command(tmp_path), rows=2)


def test_a_killed_harvest_asks_nothing_twice(tmp_path):
    (tmp_path / "pause").touch()
    agent = command(tmp_path, "claude")
    script = ("import sys; from pathlib import Path; from so8t.data import agents;"
              "from so8t.flow.config import Research; how = Research.model_validate_json(sys.argv[1]);"
              "agents.harvest(agents.questions(how), how.agents, how, Path(sys.argv[2]), bool)")
    how = Research(agents=[agent], rows=12, concurrency=2, **QUICK).model_dump_json()
    work = subprocess.Popen([sys.executable, "-c", script, how, str(tmp_path / "cache")], start_new_session=True)
    cache = tmp_path / "cache" / "claude"
    wait_for(lambda: cache.exists() and len(list(cache.glob("*.json"))) >= 3)
    os.killpg(work.pid, signal.SIGKILL)
    work.wait()
    time.sleep(0.5)  # a command that was asked has a process group of its own, and may still answer
    (tmp_path / "pause").unlink()
    kept, before = len(list(cache.glob("*.json"))), len(asked(tmp_path))
    assert 3 <= kept < 12
    found = harvest(tmp_path, agent, rows=12)
    assert len(found.rows) == 12 and len(asked(tmp_path)) - before == 12 - kept
    assert found.costs()["claude"]["usd"] == pytest.approx(0.12)


def test_a_stop_does_not_wait_for_the_answer(tmp_path):
    (tmp_path / "fault").write_text("sleep")
    stopped = threading.Event()
    caught = []

    def call():
        try:
            agents.call_command(command(tmp_path), "Topic. Right verdict: ALLOW.", 60, stopped)
        except agents.Fault as fault:
            caught.append(fault)

    thread = threading.Thread(target=call)
    thread.start()
    wait_for(lambda: (tmp_path / "child").exists() and (tmp_path / "child").read_text())
    stopped.set()
    thread.join(10)
    assert caught and wait_for(lambda: gone(int((tmp_path / "child").read_text())), 10)


def test_the_pace_is_kept(monkeypatch):
    "Ten questions at 600 a minute: the last one waits nine tenths of a second, whatever the agent does."
    waits, pace = [], agents.Pace(600, threading.Event())
    monkeypatch.setattr(pace.stopped, "wait", waits.append)
    for _ in range(10):
        pace.turn()
    assert waits[0] == 0 and waits == sorted(waits) and 0.5 < waits[-1] <= 0.9


class Endpoint(BaseHTTPRequestHandler):
    "An endpoint that misbehaves: each call takes the next of `server.plan`."

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.headers.get("Authorization"), body))
        status, headers, body = self.server.plan.pop(0) if self.server.plan else (500, {}, b"")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for byte in [body] if body != b"drip" else [b" "] * 100:
            self.wfile.write(byte)
            time.sleep(0.1 if body == b"drip" else 0)

    def log_message(self, *words):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    server.daemon_threads, server.plan, server.seen = True, [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    server.agent = Agent(name="lab", url=url, key="DEMO_API_KEY", licence="MIT", prices=[1, 5])
    yield server
    server.shutdown()
    server.server_close()


def said(prompt: str = "A ticket?", **more) -> bytes:
    answer = {"prompt": prompt, "verdict": "ALLOW", "reason": "R", "task": "T", "safety": "S", "policy": "P",
              "final": "F", "answer": "Tell the clerk.", "sources": []}
    return json.dumps({"choices": [{"message": {"content": json.dumps(answer)}}]} | more).encode()


def test_an_endpoint_that_is_busy_is_asked_later_and_its_key_stays_in_the_header(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", "sk-0123456789")
    used = {"prompt_tokens": 1_000_000, "completion_tokens": 200_000}
    endpoint.plan[:] = [(429, {"Retry-After": "0"}, b""), (503, {}, b""), (200, {}, b"<html>")]
    endpoint.plan += [(200, {}, said(usage=used))]
    found = harvest(tmp_path, endpoint.agent, rows=1, languages=["en"])
    assert found.costs()["lab"] == {"answers": 1, "rows": 1, "read": 1_000_000, "written": 200_000, "usd": 2.0}
    assert {key for key, _ in endpoint.seen} == {"Bearer sk-0123456789"} and len(endpoint.seen) == 4
    assert all(b"0123456789" not in body for _, body in endpoint.seen)
    assert json.loads(endpoint.seen[0][1])["response_format"]["json_schema"]["strict"]


def test_retry_after_is_obeyed(endpoint, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", "sk-0123456789")
    endpoint.plan[:] = [(429, {"Retry-After": "17"}, b"")]
    with pytest.raises(agents.Fault) as caught:
        agents.call_endpoint(endpoint.agent, "Hello", 5)
    assert caught.value.wait == 17


@pytest.mark.parametrize("status", [301, 400, 401, 404])
def test_what_cannot_get_better_is_a_problem_at_once(endpoint, tmp_path, monkeypatch, status):
    monkeypatch.setenv("DEMO_API_KEY", "sk-0123456789")
    endpoint.plan[:] = [(status, {"Location": "http://127.0.0.1:9/"}, b'{"error": "bad key sk-0123456789"}')] * 9
    with pytest.raises(Problem, match=f"lab: HTTP {status}") as caught:
        harvest(tmp_path, endpoint.agent, rows=4, concurrency=1, retries=5)
    assert "0123456789" not in str(caught.value) and len(endpoint.seen) <= 2


def test_an_endpoint_that_drips_or_is_gone_is_given_up(endpoint, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", "sk-0123456789")
    endpoint.plan[:] = [(200, {}, b"drip")]
    with pytest.raises(agents.Fault, match="no end of its answer within 0.5 s"):
        agents.call_endpoint(endpoint.agent, "Hello", 0.5)
    nobody = Agent(name="nobody", url="http://127.0.0.1:9/v1", licence="MIT")
    with pytest.raises(agents.Fault, match="ConnectError"):
        agents.call_endpoint(nobody, "Hello", 5)


def model(folder: Path, text: str) -> Path:
    """A Llama with random weights that knows the characters of a text, as a GGUF file.

    llama.cpp forces its tokens through the schema, but is thrown off by tokens that are single bytes; so these are made
    unlikely: one direction of the hidden state is the same everywhere, and their rows in the head point away."""
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines() * 3 + ["".join(map(chr, range(32, 127)))]), model_writer=vocabulary,
        vocab_size=500, model_type="bpe", byte_fallback=True, normalization_rule_name="identity", pad_id=-1,
        hard_vocab_limit=False, minloglevel=2, num_threads=1, character_coverage=1.0)
    (folder / "tokenizer.model").write_bytes(vocabulary.getvalue())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    odd = [i for i, token in enumerate(tokens) if token.startswith("<") and token != "</s>"]
    with torch.no_grad():
        llama.model.embed_tokens.weight[:, 0] = 10
        llama.lm_head.weight[odd, 0] = -10
    llama.save_pretrained(folder)
    gguf.convert(folder, folder / "model.gguf", name="tiny")
    return folder / "model.gguf"


def test_a_real_model_in_llama_cpp_writes_rows(tmp_path):
    "Random weights say nonsense; the schema makes rows of it, and that is all that is looked at here."
    wish = agents.questions(Research(rows=1, languages=["en"], topics=["offices"]))[0]
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(model(tmp_path, agents.prompt_for(wish))), 8192, 1
    params.chat_template, params.verbosity, params.warmup, params.cpuparams.n_threads = "chatml", -1, False, 1
    server = xllamacpp.Server(params)
    agent = Agent(name="tiny", url=f"{server.listening_address}/v1", licence="MIT")
    found = harvest(tmp_path, agent, rows=4, languages=["en"], topics=["offices"])
    assert len(found.rows) + len(found.refused) == 4 and len(found.replies) >= 3
    assert all(reply["read"] > 500 and reply["written"] > 50 for _, reply in found.replies)
    assert all(json.loads(reply["text"]).keys() == agents.Answer.model_fields.keys() for _, reply in found.replies)
    assert {row["labeller"] for row in found.rows} == {"agent:tiny"}


def pipeline(root: Path, text: str, *words: str) -> Path:
    "A run of the real stages in a workspace of its own; its folder."
    for folder in ("nbs/stages", "configs"):
        shutil.copytree(ROOT / folder, root / folder)
    shutil.copy(ROOT / "settings.ini", root)
    (root / "configs" / "mine.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", "from so8t.cli import main; main()", "run", "mine", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((root / "runs").glob("mine-*"))


def test_the_stage_shows_prompts_and_answers_but_no_thought(tmp_path, monkeypatch):
    monkeypatch.setenv("AGENT_HOME", str(tmp_path))  # a folder in the configuration is an input, and this one changes
    agent = command(Path("$AGENT_HOME"), "claude").model_dump()
    config = {"stages": ["research"], "research": QUICK | {"agents": [agent, "codex"], "rows": 4}}
    run = pipeline(tmp_path / "workspace", json.dumps(config), "--anyway")
    row = next(iter_rows(run.glob("artifacts/research/*/rows-*.parquet")))
    page = (run / "notebooks" / "research.html").read_text(encoding="utf-8")
    assert row["prompt"] in page and row["answer"] in page and "its licence NOASSERTION is not in" in page
    assert row["task"] == "Papers forgotten." and not any(row[name] in page for name in ("task", "safety", "policy"))
    assert len(asked(tmp_path)) == 4 and len(list((tmp_path / "workspace/runs/.answers/claude").glob("*.json"))) == 4


@pytest.mark.soak
def test_aegis_v2_comes_to_one_model(tmp_path):
    text = (ROOT / "configs" / "aegis_v2.yaml").read_text(encoding="utf-8").replace("name: aegis_v2", "name: mine")
    small = ["model.base=tiny", "model.tiny={hidden: 64, layers: 2, heads: 4, steps: 60}"]
    run = pipeline(tmp_path, text, *(word for key in small for word in ("--set", key)))
    done = [json.loads(file.read_text(encoding="utf-8")) for file in run.glob("artifacts/*/*/manifest.json")]
    assert {manifest["stage"] for manifest in done} == {"base", "research", "cleanse", "ppo", "integrate"}
    model, = run.glob("artifacts/integrate/*/")
    assert (model / "model-f16.gguf").is_file() and (model / "C" / "config.json").is_file()
