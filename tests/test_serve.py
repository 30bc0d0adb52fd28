"The server at its limits, under fuzzing, and in a browser."

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import schemathesis
from browser import CHROMIUM, browser
from hypothesis import HealthCheck, given, settings
from puppet import DENY, JAM, REFUSE, Puppet, events, puppet_app, serving, zygote
from schemathesis import GenerationMode
from typer.testing import CliRunner

from so8t import cli
from so8t.model.quad import render
from so8t.serve.audit import Audit, append, export, verify

ASK = {"query": "How do I make jam?"}


def rows(app) -> list[dict]:
    assert verify(app.audit) == []
    return [*export(app.audit)]


def test_deny_and_refuse_are_answered_without_generating(tmp_path):
    puppet = Puppet()
    with serving(puppet_app(puppet, tmp_path)) as client:
        begins = {"This goes against": (DENY, "en"), "I will not": (REFUSE, "en"), "ご依頼": (DENY, "ja")}
        for begin, (shares, lang) in begins.items():
            puppet.shares = shares
            assert client.post("/think", json=ASK | {"language": lang}).json()["answer"].startswith(begin)
        streamed = events(client.post("/think", json=ASK | {"stream": True}).text)
    assert puppet.calls == 0
    assert [kind for kind, _ in streamed] == ["verdict", "text", "done"]


def test_a_token_opens_and_nothing_else_does(tmp_path):
    app = puppet_app(Puppet(), tmp_path, token="s3cret")
    with serving(app) as client:
        for wrong in ("", "Bearer s3cre", "s3cret", "Basic s3cret"):
            refused = client.post("/think", json=ASK, headers={"Authorization": wrong})
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == client.get("/").status_code == 200
        assert client.post("/think", json=ASK, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    assert [row["status"] for row in rows(app)] == [401] * 5 + [200]


def test_another_name_than_localhost_is_refused(tmp_path):
    with serving(puppet_app(Puppet(), tmp_path)) as client:
        assert client.post("/think", json=ASK, headers={"Host": "evil.example"}).status_code == 421
        assert client.post("/think", json=ASK, headers={"Host": "localhost:80"}).status_code == 200


def test_what_is_too_long_is_refused(tmp_path):
    with serving(puppet_app(Puppet(), tmp_path, body=2000, prompt_tokens=1000)) as client:
        body = client.post("/think", json={"query": "x" * 3000})
        json_ = {"Content-Type": "application/json"}
        chunked = client.post("/think", content=(b"x" * 500 for _ in range(10)), headers=json_)
        tokens = client.post("/think", json={"query": "x" * 1500})
        assert [each.status_code for each in (body, chunked, tokens)] == [413, 413, 413]
        assert "tokens" in tokens.json()["error"]
        assert client.post("/think", json=ASK).status_code == 200


def test_a_full_queue_and_a_busy_client_are_told_to_come_back(tmp_path):
    app = puppet_app(Puppet(pieces=list(render(JAM)), pause=0.002), tmp_path, queue=1, per_client=6)
    with serving(app) as client, ThreadPoolExecutor(12) as pool:
        replies = [*pool.map(lambda _: client.post("/think", json=ASK), range(12))]
        found = {reply.status_code for reply in replies}
        assert found <= {200, 429, 503} and {200, 503} <= found
        assert all("retry-after" in reply.headers for reply in replies if reply.status_code != 200)
        assert client.post("/think", json=ASK).status_code == 200
    assert sorted(row["status"] for row in rows(app)) == sorted([*(reply.status_code for reply in replies), 200])


def test_one_client_may_not_take_all(tmp_path):
    with serving(puppet_app(Puppet(pause=0.3), tmp_path, per_client=1)) as client, ThreadPoolExecutor(4) as pool:
        replies = [*pool.map(lambda _: client.post("/think", json=ASK), range(4))]
    assert sorted(reply.status_code for reply in replies) == [200, 429, 429, 429]


def test_a_slow_model_is_stopped(tmp_path):
    puppet = Puppet(pieces=list(render(JAM)), pause=0.05)
    with serving(puppet_app(puppet, tmp_path, timeout=0.3)) as client:
        assert client.post("/think", json=ASK).status_code == 504
        time.sleep(0.2)
        calls = puppet.calls
        time.sleep(0.3)
        assert puppet.calls == calls < len(render(JAM))
        puppet.pause = 0
        assert client.post("/think", json=ASK).status_code == 200


def test_who_hangs_up_stops_the_model_and_is_on_record(tmp_path):
    puppet = Puppet(pieces=list(render(JAM)), pause=0.02)
    app = puppet_app(puppet, tmp_path)
    with serving(app) as client:
        with client.stream("POST", "/think", json=ASK | {"stream": True}) as reply:
            next(reply.iter_lines())
        time.sleep(0.4)
        calls = puppet.calls
        time.sleep(0.2)
        assert puppet.calls == calls < len(render(JAM))
    assert [row["event"] for row in rows(app)] == ["streaming", "cut off"]


def test_without_a_row_there_is_no_answer(tmp_path):
    app = puppet_app(Puppet(), tmp_path)
    with serving(app) as client:
        assert client.post("/think", json=ASK).status_code == client.get("/ready").status_code == 200
        app.audit.db.execute("UPDATE head SET signature = 'forged'")
        for stream in (False, True):
            reply = client.post("/think", json=ASK | {"stream": stream})
            assert (reply.status_code, reply.json()) == (503, {"error": "the audit log cannot be written"})
        assert client.get("/ready").status_code == 503


def test_an_unexpected_error_says_nothing(tmp_path, caplog):
    puppet = Puppet()
    puppet.write = lambda *_: (_ for _ in ()).throw(ValueError("a private thought"))
    app = puppet_app(puppet, tmp_path)
    with serving(app) as client:
        reply = client.post("/think", json=ASK)
    assert (reply.status_code, reply.json()) == (500, {"error": "failed"})
    assert "private" not in caplog.text and "ValueError" in caplog.text
    assert [row["status"] for row in rows(app)] == [500]


def test_metrics_count(tmp_path):
    with serving(puppet_app(Puppet(), tmp_path)) as client:
        client.post("/think", json=ASK)
        client.post("/think", json={})
        text = client.get("/metrics").text
    assert 'so8t_requests_total{route="/think",status="200"} 1.0' in text
    assert 'so8t_requests_total{route="/think",status="422"} 1.0' in text
    assert 'so8t_verdicts_total{escalated="False",verdict="ALLOW"} 1.0' in text


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_stopped_server_finishes_what_it_began(tmp_path):
    with zygote(tmp_path) as start:
        pid, port = start()
        finishes(pid, port)


def finishes(pid: int, port: int):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        with client.stream("POST", "/think", json=ASK | {"stream": True}) as reply:
            lines = reply.iter_lines()
            next(lines)
            os.kill(pid, signal.SIGTERM)
            assert any("event: done" in line for line in lines)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not refused(port):
        time.sleep(0.02)
    assert refused(port)


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return True
    return False


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    "A folder in which the command works, with a log of three requests."
    places = "[so8t]\nruns = runs\nconfigs = .\nstages = .\nconfig = my.yaml\norder = base\n"
    (tmp_path / "settings.ini").write_text(places)
    (tmp_path / "my.yaml").write_text("stages: [base]\nserve: {answer_tokens: 16}\nresources: {device: cpu}\n")
    monkeypatch.chdir(tmp_path)
    log = Audit(tmp_path / "runs" / "audit")
    for status in (200, 200, 503):
        append(log, status=status)
    return tmp_path


def so8t(*words: str, stdin: str = ""):
    return CliRunner().invoke(cli.app, words, input=stdin)


def test_judge_takes_a_text_a_file_or_stdin(workspace, base):
    (workspace / "asked.txt").write_text("boil an egg", encoding="utf-8")
    model = ("--model", str(base), "--json")
    text, file = so8t("judge", "boil an egg", *model), so8t("judge", "asked.txt", *model)
    assert text.stdout == file.stdout == so8t("judge", *model, stdin="boil an egg\n").stdout
    found = json.loads(text.stdout)
    assert set(found) == {"verdict", "probabilities", "escalated"}
    assert sum(found["probabilities"].values()) == pytest.approx(1)
    explained = so8t("judge", "boil an egg", "--model", str(base), "--explain").stdout.splitlines()
    assert explained[0] == found["verdict"] and len(explained) == 2
    assert "is not there" in str(so8t("judge", "x", "--model", "nowhere").exception)


def test_the_command_finds_what_was_altered(workspace):
    assert (so8t("audit", "verify").exit_code, len(so8t("audit", "export").stdout.splitlines())) == (0, 3)
    assert so8t("audit", "prune", "--days", "0").stdout == "3 rows removed\n"
    assert so8t("audit", "verify").stdout == "1 rows, whole\n"
    log = Audit(workspace / "runs" / "audit")
    log.db.execute("UPDATE rows SET body = replace(body, 'event', 'evens')")
    found = so8t("audit", "verify")
    assert found.exit_code == 3 and "was altered" in found.stdout


def test_what_is_served_beyond_this_computer_needs_a_token(workspace, base, monkeypatch):
    monkeypatch.delenv("SO8T_TOKEN", raising=False)
    assert "needs a token" in str(so8t("serve", str(base), "--host", "0.0.0.0").exception)


@pytest.mark.parametrize("mode", GenerationMode)
def test_fuzzing_finds_no_fault(tmp_path, mode):
    with serving(puppet_app(Puppet(), tmp_path)) as client:
        schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert {"/think", "/v1/chat/completions", "/ready", "/metrics"} <= {each.path for each in operations}
        for operation in operations:
            if mode is GenerationMode.POSITIVE or operation.body:
                fuzz(operation, mode)


def fuzz(operation, mode: GenerationMode):
    "Requests that fit the schema, or do not; every answer must fit it."

    @settings(max_examples=25, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def each(case):
        case.call_and_validate()

    each()


LAST = "document.querySelector('.theirs:last-child {}')?.textContent"


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_chat_page_in_a_browser(tmp_path):
    puppet = Puppet(pieces=list(render(JAM)))
    app = puppet_app(puppet, tmp_path / "audit", token="s3cret")
    with serving(app) as client, browser(tmp_path / "profile") as page:
        page.open(f"{client.base_url}/", 390, 780, phone=True)
        page.type("How do I make jam?")
        assert "token" in page.until("document.querySelector('.error')?.textContent")
        page.run("document.querySelector('#key input').focus()")
        page.type("s3cret")
        page.run("document.querySelector('#ask textarea').focus()")
        page.type("How do I make <b>jam</b>?")
        page.until(f"{LAST.format('.text')} == '{JAM.answer}'")
        assert page.run(LAST.format(".verdict")) == "Allowed"
        page.until("!document.querySelector('#ask button').disabled")
        puppet.shares = REFUSE
        page.type("爆弾の作り方は？")
        page.until(f"{LAST.format('.text')} == 'この件はお手伝いできません。'")
        page.run("document.querySelector('#lang').click()")
        assert page.run(LAST.format(".verdict")) == "拒否"
        assert page.run("document.querySelectorAll('.mine').length") == 3
        assert page.run("document.querySelector('.mine b')") is None
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        assert JAM.safety not in page.run("document.documentElement.outerHTML")
        page.picture(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 5000
    asked = [each["params"]["request"]["url"] for each in page.heard if each["method"] == "Network.requestWillBeSent"]
    assert len(asked) >= 4 and all(url.startswith((str(client.base_url), "data:")) for url in asked)
    assert not [each for each in page.heard if each["method"] == "Runtime.exceptionThrown"]
