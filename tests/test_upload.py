"What the notebook of ship.upload cannot show: a process that dies while sending, a Hub that fails, the doctor."

import json
import os
import subprocess
import sys

import psutil
import pytest
from hub_server import HubServer

from so8t.flow import config as configs
from so8t.flow import disk
from so8t.flow.problem import Problem
from so8t.ops import doctor
from so8t.ship import upload

PAGE = configs.Upload(target="hub", repo="somebody/tiny", token_env="SO8T_TOKEN")
LARGE = ("model.safetensors", "model-f16.gguf", "model-q8_0.gguf")


@pytest.fixture
def hub(monkeypatch):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("SO8T_TOKEN", "hf_good")
        yield server


@pytest.fixture
def integrate(tmp_path):
    "A published model, and what is known of it."
    with disk.publish(tmp_path / "integrate") as staging:
        (staging / "B").mkdir()
        (staging / "B" / "config.json").write_text("{}")
        for name in LARGE:
            (staging / ("B" if name.endswith("safetensors") else ".") / name).write_text(f"weights of {name}")
    files = disk.read_manifest(tmp_path / "integrate")["files"]
    return tmp_path / "integrate", {"model": "B", "files": {name.removeprefix("B/"): f for name, f in files.items()}}


@pytest.fixture
def parcel(tmp_path, integrate):
    (tmp_path / "parcel").mkdir()
    upload.pack(*integrate, "---\nlicense: mit\n---\n\n# tiny\n", tmp_path / "parcel")
    return tmp_path / "parcel"


def test_a_killed_upload_goes_on_where_it_was(hub, parcel):
    hub.hold = 3
    asked = {"parcel": str(parcel), "repo": PAGE.repo, "private": True, "token": "hf_good", "pauses": []}
    env = os.environ | {"HF_HUB_OFFLINE": "0"}
    child = subprocess.Popen([sys.executable, "-c", upload.CHILD], stdin=subprocess.PIPE, env=env, text=True)
    child.stdin.write(json.dumps(asked))
    child.stdin.close()
    assert hub.held.wait(60)
    assert "hf_good" not in " ".join(psutil.Process(child.pid).cmdline())
    while len(hub.storage) < 2:
        assert child.poll() is None
    before = set(hub.storage)
    child.kill()
    child.wait()
    hub.hold, hub.puts = 0, []
    hub.go.set()
    assert not hub.repos[PAGE.repo]["files"], "a page is whole or not there"
    upload.to_hub(parcel, PAGE)
    assert not before & set(hub.puts), "sent twice"
    assert set(hub.repos[PAGE.repo]["files"]) == {"README.md", "metadata.json", "config.json", *LARGE}


def test_a_hub_that_is_busy_is_asked_again(hub, parcel):
    hub.fails = [("/api/repos/create", 503), ("/storage/", 503), ("/commit/", 500)]
    sent = upload.to_hub(parcel, PAGE, pauses=(0.05, 0.05))
    page = hub.repos[PAGE.repo]
    assert not hub.fails and len(page["commits"]) == 1 and sent["digest"] == page["sha"] and page["private"]


def test_a_hub_that_stays_away_is_no_mistake_of_the_user(hub, parcel):
    hub.fails = [("/api/repos/create", 503)] * 2
    with pytest.raises(ConnectionError, match="did not come through"):
        upload.to_hub(parcel, PAGE, pauses=(0.05,))
    assert not hub.fails


def expire(hub):
    hub.token = "hf_new"


def demote(hub):
    hub.role = "read"


def expose(hub):
    hub.repos[PAGE.repo] = {"private": False, "sha": "0" * 40, "files": {}, "commits": []}


@pytest.mark.parametrize("happens, said", [
    (expire, "the token is refused; it may have expired"), (demote, "may not write to somebody/tiny"),
    (expose, "everybody can see it")])
def test_what_will_stay_is_said_at_once(hub, parcel, happens, said):
    happens(hub)
    with pytest.raises(Problem, match=said) as problem:
        upload.to_hub(parcel, PAGE, pauses=(60,))
    assert not hub.puts and "hf_good" not in str(problem.value)


def test_what_does_not_verify_does_not_go(tmp_path, integrate):
    file = integrate[0] / "model-q8_0.gguf"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(Problem, match="model-q8_0.gguf: sha256 differs"):
        upload.pack(*integrate, "# tiny", tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("text", [
    "Ask jan@example.org", "電話は090-1234-5678まで", "token = hf_abcdefghijklmnopqrstuvwxyz0123456789",
    "It thinks <think-task>so</think-task>"])
def test_what_is_private_does_not_go(tmp_path, integrate, text):
    (tmp_path / "out").mkdir()
    with pytest.raises(Problem, match="README.md line 3") as problem:
        upload.pack(*integrate, f"# tiny\n\n{text}\n", tmp_path / "out")
    assert text not in str(problem.value)


@pytest.mark.parametrize("happens, status", [(None, "fine"), (expire, "abort"), (demote, "abort"), ("away", "warn")])
def test_the_doctor_asks_before_the_run(hub, monkeypatch, happens, status):
    if happens == "away":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif happens:
        happens(hub)
    config = configs.Config(name="a", stages=["base", "upload"], upload=PAGE)
    assert [check.status for check in doctor.hub_token(config)] == [status]
    assert doctor.hub_token(configs.Config(name="a", stages=["base"], upload=PAGE)) == []
