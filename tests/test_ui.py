"The pages: they follow a real run in a real browser, on a phone, and let nobody in who may not."

import os
import re
import socket
import sys
import time
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from browser import CHROMIUM, browser
from garden import Garden, gone, wait_for
from puppet import JAM, Puppet, puppet_app, serving

from so8t.eval import figures
from so8t.flow import disk
from so8t.flow.config import Serve
from so8t.model.quad import render
from so8t.serve import ui

with_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
LOOSE = "<script>fetch('/').then(() => document.title = 'out', () => document.title = 'kept in')</script>"


def seen(folder: Path, **more) -> dict:
    "A run of one stage, as the command hands it over."
    now = datetime.now().astimezone().isoformat()
    stage = {"stage": "report", "status": "finished", "seconds": 4.0, "attempts": 1, "reason": "", "error": None}
    stage |= {"artifact": str(folder / "artifacts" / "report" / "0123456789ab"), "published": now}
    return {"id": folder.name, "status": "completed", "cause": None, "created": now, "updated": now, "starts": 1,
            "last_error": None, "progress": None, "stages": [stage], "checkpoints": [], **more}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "runs" / "smol-20260314-090000"
    disk.write_text(made / "notebooks" / "report.html", LOOSE)
    disk.append_jsonl(made / "metrics" / "report.jsonl", *({"step": i, "loss": 1 / i} for i in range(1, 500)))
    return made


def pages(folder: Path, token: str = "", judge=None, **more) -> ui.Door:
    return ui.ui_app(ui.Look(lambda: [folder], lambda each: seen(each, **more)), Serve(), token, judge)


def test_the_colours_are_those_of_the_report():
    said = dict(re.findall(r"--(\w+): (#\w{6})", (ui.ASSETS / "ui.css").read_text()))
    for name in ("INK", "MUTED", "RULE", "PAPER", "BAND"):
        assert said[name.lower()] == getattr(figures, name)
    assert (said["live"], said["bad"]) == (figures.BETTER, figures.WORSE)


def test_nothing_but_runs_and_stages_is_served(folder):
    secret = folder / "notebooks" / "secret.html"
    secret.write_text("private")
    with serving(pages(folder)) as client:
        assert client.get(f"/runs/{folder.name}/report").text == LOOSE
        for path in ("/runs/%2e%2e%2fruns", f"/runs/{folder.name}/stages/secret", "/ui.css/../page.html",
                     f"/runs/{folder.name}/stages/..%2f..%2fmetrics", "/openapi.json", "/judge/"):  # fmt: skip
            assert client.get(path).status_code == 404, path
        assert client.get("/ui.css?name=page.html").headers["content-type"].startswith("text/css")
        assert {client.request(how, "/").status_code for how in ("POST", "PUT", "DELETE", "PATCH")} == {405}


def test_what_a_run_says_is_text(folder):
    with serving(pages(folder, status="failed", last_error="<script>alert(1)</script>")) as client:
        for path in ("/", f"/runs/{folder.name}"):
            assert "&lt;script&gt;alert(1)" in client.get(path).text
            assert "script-src 'self'" in client.get(path).headers["content-security-policy"]


def test_a_token_opens_and_nothing_else_does(folder, tmp_path):
    judge = puppet_app(Puppet(pieces=list(render(JAM))), tmp_path / "audit", token="s3cret")
    with serving(pages(folder, "s3cret", judge)) as client:
        for path in ("/", f"/runs/{folder.name}", "/ui.css", "/judge/", "/judge/health"):
            assert client.get(path).headers["www-authenticate"].startswith("Basic")
            assert client.get(path, auth=("me", "s3cre")).status_code == 401
            assert client.get(path, auth=("me", "s3cret")).status_code == 200
            assert client.get(path, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    with serving(pages(folder)) as client:
        assert client.get("/", headers={"Host": "evil.example"}).status_code == 421


def test_a_run_that_is_over_is_read_once(folder):
    disk.append_jsonl(folder / "events.jsonl", {"event": "run_ended"})
    views = []
    look = ui.Look(lambda: [folder], lambda each: views.append(each) or seen(each))
    look.run(folder), look.run(folder)
    assert len(views) == 1
    os.utime(folder / "events.jsonl", ns=(1, 1))
    look.run(folder)
    assert len(views) == 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).is_success
    except httpx.TransportError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_pages_without_a_judge_need_no_torch(tmp_path):
    garden, port = Garden(tmp_path / "garden"), free_port()
    server = garden.start("ui", "--port", str(port))
    try:
        wait_for(lambda: answers(port))
        assert "libtorch" not in Path(f"/proc/{server.pid}/maps").read_text()
    finally:
        server.terminate()
        server.wait(30)


@with_browser
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_phone_follows_a_run(tmp_path):
    garden, port = Garden(tmp_path / "garden"), free_port()
    garden.drought()
    runner, server = garden.start("run"), garden.start("ui", "--port", str(port))
    try:
        garden.pids()
        wait_for(lambda: answers(port))
        with browser(tmp_path / "profile") as page:
            page.open(f"http://127.0.0.1:{port}/", 390, 844, phone=True)
            assert page.run("document.querySelector('.mark').textContent") == "running"
            page.run("document.querySelector('.runs a').click()")
            page.until("document.querySelector('.stages .running strong')?.textContent == 'grow'")
            page.run("window.same = true")
            garden.rain()
            page.until("document.querySelector('h1 .mark').textContent == 'completed'", patience=40)
            assert page.run("window.same && document.querySelectorAll('.stages .finished').length") == 3
            assert page.run("document.documentElement.scrollWidth <= innerWidth")
            page.run("document.querySelector('.stages a').click()")
            page.until("document.body?.textContent.includes('A stage')")
        assert runner.wait(30) == 0
    finally:
        runner.kill()
        server.terminate()
        server.wait(30)
    asked = [each["params"]["request"]["url"] for each in page.heard if each["method"] == "Network.requestWillBeSent"]
    assert len(asked) >= 6 and all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in asked)
    assert not [each for each in page.heard if each["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert gone(server.pid)


@with_browser
def test_a_report_reaches_nothing_and_the_judge_answers(folder, tmp_path):
    judge = puppet_app(Puppet(pieces=list(render(JAM))), tmp_path / "audit", token="s3cret")
    with serving(pages(folder, "s3cret", judge)) as client, browser(tmp_path / "profile") as page:
        home = f"http://127.0.0.1:{client.base_url.port}"
        page.call("Network.setExtraHTTPHeaders", headers={"Authorization": "Basic OnMzY3JldA=="})
        page.open(f"{home}/runs/{folder.name}/report")
        assert page.until("document.title") == "kept in"
        page.open(f"{home}/runs/{folder.name}")
        assert page.run("document.querySelectorAll('polyline').length") == 2
        page.run("document.querySelector('nav a:last-child').click()")
        page.until("document.querySelector('#ask textarea') && true")
        page.run("document.querySelector('#ask textarea').focus()")
        page.type("How do I make jam?")
        page.until(f"document.querySelector('.theirs .text')?.textContent == {JAM.answer!r}")


@with_browser
def test_a_server_that_is_gone_is_missed(folder, tmp_path):
    with browser(tmp_path / "profile") as page:
        with serving(pages(folder, status="running")) as client:
            page.open(f"http://127.0.0.1:{client.base_url.port}/runs/{folder.name}")
            time.sleep(0.2)
            assert not page.run("document.body.classList.contains('silent')")
        page.until("document.body.classList.contains('silent')")
        assert page.run("getComputedStyle(document.querySelector('.lost')).display") != "none"
