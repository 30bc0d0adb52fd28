"What the notebook of the audit log cannot show: servers that are killed under load, and logs that are harmed."

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest
from puppet import zygote

from so8t.flow.problem import Problem
from so8t.serve.audit import Audit, append, export, faults, prune, verify


def load(port: int, stop: Event, acknowledged: list[str], stream: bool):
    "Ask until the server is gone; keep the ids of requests that were answered to the end."
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        while not stop.is_set():
            try:
                reply = client.post("/think", json={"query": "How do I make jam?", "stream": stream})
            except httpx.HTTPError:
                time.sleep(0.01)
                continue
            if reply.status_code == 200 and (not stream or "event: done" in reply.text):
                acknowledged.append(reply.headers["x-request-id"])


def kill_under_load(pid: int, port: int, dice: random.Random, acknowledged: list[str]):
    "Four clients ask; at some moment after some answers the server dies."
    stop, enough = Event(), len(acknowledged) + dice.randint(3, 20)
    with ThreadPoolExecutor(4) as pool:
        for i in range(4):
            pool.submit(load, port, stop, acknowledged, i % 2 == 0)
        while len(acknowledged) < enough:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        os.kill(pid, signal.SIGKILL)
        stop.set()


def survives_kills(home: Path, kills: int, seed: int) -> int:
    "Kill a server under load at random moments; how many answers were acknowledged, each with its row."
    dice, acknowledged = random.Random(seed), []
    with zygote(home) as start:
        for _ in range(kills):
            pid, port = start()
            kill_under_load(pid, port, dice, acknowledged)
            audit = Audit(home)
            assert verify(audit) == []
            answered = {row["id"] for row in export(audit) if row["event"] == "answered"}
            assert set(acknowledged) <= answered
            audit.db.close()
    return len(acknowledged)


posix = pytest.mark.skipif(os.name == "nt", reason="needs fork and SIGKILL")


@posix
def test_two_kills_lose_no_acknowledged_row(tmp_path):
    assert survives_kills(tmp_path / "audit", 2, seed=0) >= 6


@posix
@pytest.mark.soak
def test_twenty_kills_lose_no_acknowledged_row(tmp_path):
    assert survives_kills(tmp_path / "audit", 20, seed=1) >= 60


def test_two_processes_make_one_chain(tmp_path):
    code = (
        "import sys; from pathlib import Path; from so8t.serve.audit import Audit, append;"
        "audit = Audit(Path(sys.argv[1]));"
        "[append(audit, who=sys.argv[2]) for _ in range(40)]"
    )
    Audit(tmp_path)
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, who]) for who in "ab"]
    assert [each.wait() for each in both] == [0, 0]
    audit = Audit(tmp_path)
    assert verify(audit) == []
    assert sorted(row["who"] for row in export(audit)) == ["a"] * 40 + ["b"] * 40


def test_every_single_change_to_a_row_is_found(tmp_path):
    audit = Audit(tmp_path)
    for i in range(8):
        append(audit, id=f"r{i}", status=200)
    prune(audit, 0)
    for i in range(8):
        append(audit, id=f"s{i}", status=200)
    assert verify(audit) == []
    rows = audit.db.execute("SELECT seq, body, mac FROM rows").fetchall()
    for seq, body, mac in rows:
        changes = {"body": [body.replace("0", "1", 1), body + " "], "mac": [mac[::-1]], "seq": [seq + 90]}
        for column, value in [(column, value) for column, values in changes.items() for value in values]:
            assert found_after(audit, f"UPDATE rows SET {column} = ? WHERE seq = ?", value, seq), (seq, column)
        assert found_after(audit, "DELETE FROM rows WHERE seq >= ?", seq), seq
        assert found_after(audit, "DELETE FROM rows WHERE seq <= ?", seq), seq
    assert verify(audit) == []


def found_after(audit: Audit, statement: str, *values) -> list[str]:
    "What is found after a change, which is then undone."
    audit.db.execute("BEGIN")
    audit.db.execute(statement, values)
    found = [*faults(audit)]
    audit.db.execute("ROLLBACK")
    return found


def test_a_log_with_another_key_is_refused(tmp_path):
    audit = Audit(tmp_path / "log")
    append(audit, status=200)
    audit.db.close()
    (tmp_path / "log" / "key").write_text("another")
    other = Audit(tmp_path / "log")
    assert verify(other) == ["row 1 was altered", "the head was altered"]
    with pytest.raises(Problem, match="the head was altered; nothing is added"):
        append(other, status=200)


def test_no_file_is_no_log_and_a_damaged_one_is_said(tmp_path):
    (tmp_path / "key").write_text("k")
    (tmp_path / "audit.sqlite").write_bytes(b"nonsense" * 200)
    with pytest.raises(Problem, match="not a database"):
        Audit(tmp_path)


def test_rows_are_json_without_what_was_said(tmp_path):
    audit = Audit(tmp_path)
    append(audit, query=audit.keyed("query", "my secret plan"), thinking=audit.keyed("thinking", "a private thought"))
    text = json.dumps([*export(audit)])
    assert "secret" not in text and "private" not in text
    assert audit.keyed("query", "x") != audit.keyed("thinking", "x")
