"Announcements: real apprise against a real HTTP server, a real run, and system commands that say what they were given."

import json
import os
import stat
import threading
from datetime import datetime, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from garden import Garden, wait_for
from hypothesis import given
from hypothesis import strategies as st

from so8t.flow.config import Notifications
from so8t.ops import notify


class Service(BaseHTTPRequestHandler):
    "What apprise's json:// speaks to."

    def do_POST(self):
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.fixture
def service(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.got, server.status = [], 200
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SO8T_PHONE", f"json://127.0.0.1:{server.server_port}/secret-token")
    yield server
    server.shutdown()
    server.server_close()


def system(folder: Path, monkeypatch, **exits: int) -> Path:
    """Commands that write down their words and the variables SO8T_*, and end as told.

    The real ones cannot be here: they need a desktop and a sound card. `notify-send [--app-name=NAME] TITLE TEXT` and
    `paplay FILE` and `aplay -q FILE` exit with 0 when it was shown or played to its end, else with another code."""
    for name, code in exits.items():
        file = folder / name.replace("_", "-")
        file.write_text(f'#!/bin/sh\nfor word in "$(basename "$0")" "$@"; do echo "$word"; done >> "{folder}/said"\n'
                        f'case "$2" in *.wav) cp "$2" "{folder}/heard.wav";; esac\n'
                        f'case "$1" in *.wav) cp "$1" "{folder}/heard.wav";; esac\nexit {code}\n')
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return folder / "said"


NOON = datetime(2026, 1, 1, 12)


@pytest.mark.skipif(os.name == "nt", reason="the commands are shell scripts")
def test_desktop_and_sound_by_the_systems_commands(tmp_path, monkeypatch, capsys):
    said = system(tmp_path, monkeypatch, notify_send=0, paplay=1, aplay=0)
    monkeypatch.setattr(notify.show, "__defaults__", ("Linux",))
    monkeypatch.setattr(notify.play, "__defaults__", ("Linux",))
    both = Notifications(sound=True, desktop=True)
    found = notify.announce(both, "failure", "so8t smol", "failed: $(rm -rf x); no room", NOON)
    assert found == [("sound", ""), ("desktop", "")]
    words = said.read_text().splitlines()
    assert [word for word in words if word in ("paplay", "aplay", "notify-send")] == ["paplay", "aplay", "notify-send"]
    assert words[-2:] == ["so8t smol", "failed: $(rm -rf x); no room"]
    assert (tmp_path / "heard.wav").read_bytes()[:4] == b"RIFF" and capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="the commands are shell scripts")
def test_without_a_player_the_bell_rings_and_without_a_desktop_it_is_said(tmp_path, monkeypatch, capsys):
    system(tmp_path, monkeypatch, notify_send=3)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(notify.show, "__defaults__", ("Linux",))
    found = notify.announce(Notifications(sound=True, desktop=True), "finish", "so8t", "completed", NOON)
    assert found[0] == ("sound", "") and capsys.readouterr().err == "\a"
    assert found[1][1].startswith("notify-send: exit code")
    (tmp_path / "notify-send").unlink()
    found = notify.announce(Notifications(desktop=True), "finish", "a", "b", NOON)
    assert found == [("desktop", "no notify-send here")]


def test_every_system_has_its_way_and_words_are_no_code():
    assert notify.DESKTOPS.keys() == notify.PLAYERS.keys() == {"Windows", "Darwin", "Linux"}
    code = notify.DESKTOPS["Darwin"][2:-2]
    assert not any("{" in word for word in code) and notify.DESKTOPS["Darwin"][-2:] == ["{title}", "{text}"]
    assert "{title}" not in notify.DESKTOPS["Windows"] and "{text}" not in notify.DESKTOPS["Windows"]
    toast = notify.resources.files("so8t").joinpath("assets", "toast.ps1").read_text(encoding="utf-8")
    assert "$env:SO8T_TITLE" in toast and "$env:SO8T_TEXT" in toast


def test_a_service_that_fails_is_said_without_its_secret(service, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SO8T_NOBODY", "json://127.0.0.1:9/secret-token")
    monkeypatch.setenv("SO8T_WRONG", "nothing://secret-token")
    (tmp_path / "urls").write_text(f"# my phone\n{os.environ['SO8T_PHONE']}\n")
    names = ["SO8T_PHONE", "SO8T_NOBODY", "SO8T_WRONG", "SO8T_UNSET"]
    settings = Notifications(urls=names, url_file=str(tmp_path / "urls"))
    found = notify.announce(settings, "failure", "so8t smol", "failed: no room", NOON)
    assert [why == "" for _, why in found] == [True, False, False, False, True]
    assert [got["type"] for got in service.got] == ["failure"] * 2 and service.got[0]["message"] == "failed: no room"
    assert "secret-token" not in str(found) and "secret-token" not in caplog.text
    service.status = 500
    found = notify.announce(Notifications(urls=["SO8T_PHONE"]), "finish", "a", "b", NOON)
    assert found == [("SO8T_PHONE", "the service did not take it")]


def test_a_fault_inside_reaches_nobody(monkeypatch):
    monkeypatch.setattr(notify, "execute", lambda *_, **__: 1 / 0)
    assert notify.announce(Notifications(desktop=True), "finish", "a", "b", NOON) == [("desktop", "ZeroDivisionError")]


@given(st.times(), st.times(), st.times())
def test_quiet_hours(start, end, now):
    start, end, now = (time(t.hour, t.minute) for t in (start, end, now))
    inside = {(datetime.combine(NOON, start).hour * 60 + start.minute + i) % 1440
              for i in range((end.hour * 60 + end.minute - start.hour * 60 - start.minute) % 1440)}
    hours = f"{start:%H:%M}-{end:%H:%M}"
    assert notify.quiet(hours, datetime.combine(NOON, now)) == (now.hour * 60 + now.minute in inside)


def test_quiet_hours_let_a_failure_through_without_noise(service, capsys):
    settings = Notifications(urls=["SO8T_PHONE"], sound=True, quiet="22:00-07:00")
    midnight = datetime(2026, 1, 1)
    assert notify.announce(settings, "finish", "a", "b", midnight) == [] == service.got
    assert notify.announce(settings, "failure", "a", "b", midnight) == [("SO8T_PHONE", "")]
    assert len(service.got) == 1 and capsys.readouterr().err == ""


def test_a_run_announces_its_start_and_its_end(service, tmp_path, monkeypatch):
    garden = Garden(tmp_path)
    monkeypatch.setenv("SO8T_NOBODY", "json://127.0.0.1:9/secret-token")
    more = "\nnotifications: {urls: [SO8T_NOBODY, SO8T_PHONE], events: [start, finish, failure, recovery]}\n"
    garden.config.write_text(garden.config.read_text() + more)
    done = garden.so8t("run", "--until", "seed")
    assert done.returncode == 0, done.stderr
    title = f"so8t {max(garden.runs.glob('garden-*')).name}"
    wait_for(lambda: len(service.got) == 2, 5)
    assert [(got["title"], got["message"]) for got in service.got] == [
        (title, "started"), (title, "the stages that were asked for are finished")]
    assert "could not be announced by SO8T_NOBODY" in done.stdout + done.stderr
    kept = "".join(p.read_text(errors="replace") for p in garden.runs.rglob("*") if p.is_file())
    assert "SO8T_PHONE" in kept and "secret-token" not in kept


def test_a_run_that_fails_says_why(service, tmp_path):
    garden = Garden(tmp_path)
    broken = garden.config.read_text().replace("kind: oak", "sort: oak").replace("retries: 1", "retries: 0")
    garden.config.write_text(broken + "\nnotifications: {urls: [SO8T_PHONE], events: [failure]}\n")
    assert garden.so8t("run").returncode == 1
    assert [got["type"] for got in service.got] == ["failure"]
    assert service.got[0]["message"].startswith("failed: ") and "kind" in service.got[0]["message"]


def test_the_command(service, tmp_path):
    garden = Garden(tmp_path)
    assert "nothing is set" in garden.so8t("notify", "--test").stderr
    more = '\nnotifications: {urls: [SO8T_PHONE], quiet: "00:00-23:59"}\n'
    garden.config.write_text(garden.config.read_text() + more)
    assert "announced by SO8T_PHONE" in garden.so8t("notify").stdout and service.got == []
    assert garden.so8t("notify", "--test").returncode == 0 and service.got[0]["message"] == "this is a test"
    service.status = 500
    failed = garden.so8t("notify", "--test")
    assert failed.returncode == 1 and "SO8T_PHONE: the service did not take it" in failed.stdout
