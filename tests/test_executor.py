"Parts that do not depend on each other come to the same results on a Ray cluster, whatever dies there."

import hashlib
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import WORDS

from so8t.data import agents, cleanse
from so8t.data.row import SCHEMA, check_row, stored
from so8t.eval import verdicts
from so8t.flow import disk, executor
from so8t.flow.config import Agent, Data, Research, Resources
from so8t.flow.problem import Problem

os.environ |= {"RAY_raylet_start_wait_time_s": "200", "RAY_agent_register_timeout_ms": "200000"}
RAY = Resources(executor="ray")


def machine(cpus: int) -> dict:
    "A small machine of a cluster, with few processes: Ray gives one up that takes more than 15 s to start."
    with socket.create_server(("127.0.0.1", 0)) as free:
        agent = {"runtime_env_agent_port": free.getsockname()[1]}
    less = {"no_monitor": True, "include_log_monitor": False, "include_dashboard": False}
    return {"num_cpus": cpus, "object_store_memory": 100_000_000} | less | agent


@contextmanager
def cluster_of(cpus: int):
    "A cluster of one machine, on this one."
    pytest.importorskip("ray", reason='pip install "so8t[ray]"')
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=machine(cpus))
    try:
        yield cluster
    finally:
        cluster.shutdown()


def square(number: int) -> int:
    return number**2


def unlucky(number: int) -> int:
    raise Problem(f"{number}: is unlucky; another number would be right")


def deadly_once(part: tuple[int, Path]) -> tuple[int, int]:
    "Kills its worker the first time that it is asked for the third part."
    number, mark = part
    if number == 3 and not mark.exists():
        mark.write_text("died")
        os._exit(1)
    return number, os.getpid()


def slow(part: tuple[int, Path]) -> tuple[int, str]:
    "Takes its time, and leaves a line each time that it is done."
    number, log = part
    time.sleep(0.3)
    import ray

    node = ray.get_runtime_context().get_node_id()
    with log.open("a") as file:
        file.write(f"{number} {node}\n")
    return number, node


@pytest.fixture(scope="module")
def ray():
    "Ray, connected to a cluster."
    with cluster_of(2) as cluster:
        ray = executor.connect(Resources(address=cluster.address))
        yield ray
        ray.shutdown()


def test_results_come_in_order_a_killed_worker_is_replaced_and_a_problem_is_a_problem(ray, tmp_path):
    assert list(executor.map_parts(square, range(9), RAY)) == [n**2 for n in range(9)]
    found = list(executor.map_parts(deadly_once, [(n, tmp_path / "mark") for n in range(6)], RAY))
    assert [number for number, _ in found] == list(range(6)) and (tmp_path / "mark").exists()
    assert os.getpid() not in {pid for _, pid in found}
    with pytest.raises(Problem, match="^7: is unlucky; another number would be right$"):
        list(executor.map_parts(unlucky, [7], RAY))


def test_without_a_cluster_it_is_one_clear_line_in_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Problem, match="ray is not installed: pip install"):
        list(executor.mapper(RAY)(square, [1]))
    monkeypatch.undo()
    pytest.importorskip("ray")
    code = ("from so8t.flow import executor; from so8t.flow.config import Resources\n"
            f"try: executor.connect(Resources(address='127.0.0.1:{port}'))\n"
            "except Exception as error: print(type(error).__name__, error)")  # fmt: skip
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert told.stdout.startswith(f"Problem resources.address: no Ray cluster answers at 127.0.0.1:{port}"), told


def rows_of(count: int) -> list[dict]:
    return [check_row({"key": f"r{i}", "lang": "en", "area": "test", "group": f"g{i // 2}", "verdict": verdict,
                       "prompt": f"Tell me {i % 7} ways to {text}, or call 090-1234-5{i:03d}"}, "here")
            | {"source": "web"} for i in range(count) for verdict, text in WORDS.items()]  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in disk.files_below(folder).items()}


def cleansed(folder: Path, each) -> dict[str, str]:
    "Digests of what a cleansing publishes."
    folder.mkdir()
    rows = [stored(row) for row in rows_of(10)]
    tables = (pa.Table.from_pylist(rows[at : at + 6], schema=SCHEMA) for at in range(0, len(rows), 6))
    done = cleanse.cleanse(tables, Data(), folder / "scratch.arrow", each=each)
    cleanse.save(folder, done, cleanse.doubtful(done), "# card")
    return digests(folder)


def judged(base: Path, folder: Path, each) -> dict[str, str]:
    "Digests of the answers of two models."
    folder.mkdir(exist_ok=True)
    rows = [row | {"pair": None} for row in rows_of(6)]
    verdicts.judge_models(dict.fromkeys("AB", base), rows, folder, 4, each=each)
    return digests(folder)


@pytest.mark.soak
def test_cleansing_and_benchmark_are_the_same_bytes_on_a_cluster(ray, base, tmp_path):
    torch.set_num_threads(1)
    spread = executor.mapper(RAY)
    assert cleansed(tmp_path / "there", spread) == cleansed(tmp_path / "here", map)
    assert judged(base, tmp_path / "B", spread) == judged(base, tmp_path / "A", map)


@pytest.mark.soak
def test_trials_side_by_side_are_those_of_one_machine(ray, base, tmp_path):
    from test_search import objective

    from so8t.train import search

    torch.set_num_threads(1)
    found = []
    for name, each in (("here", map), ("there", executor.mapper(RAY))):
        work = objective(base, tmp_path / name)
        work.search = work.search.model_copy(update={"at_once": 2})
        found.append(search.table(search.run(work, {"data": "mine"}, each)))
    assert found[0] == found[1] and [row["number"] for row in found[0]] == [0, 1, 2]


@pytest.mark.soak
def test_agents_are_asked_from_the_cluster_and_paid_once(ray, tmp_path):
    script = tmp_path / "agent.py"
    script.write_text("import sys, pathlib\nfrom so8t.data.agents import own\n"
                      f"open({str(tmp_path / 'asked')!r}, 'a').write('x\\n')\nown()\n")  # fmt: skip
    mine = Agent(name="mine", licence="Apache-2.0", command=["{python}", str(script)])
    how = Research(agents=[mine], topics=["everyday", "medical"], rows=4, concurrency=2, per_minute=6000)
    for each in (executor.mapper(RAY), executor.mapper(RAY), map):
        found = agents.harvest(agents.questions(how), [mine], how, tmp_path / "cache", bool, each=each)
        assert len(found.replies) == 4 and (tmp_path / "asked").read_text().count("x") == 4


@pytest.mark.soak
def test_a_machine_is_lost_in_the_middle(tmp_path):
    pytest.importorskip("ray").shutdown()
    with cluster_of(1) as cluster:
        other = cluster.add_node(**machine(1))
        cluster.wait_for_nodes()
        ray = executor.connect(Resources(address=cluster.address))
        log, found, lost = tmp_path / "log", [], other.node_id
        for number, node in executor.map_parts(slow, [(n, log) for n in range(40)], RAY):
            found.append((number, node))
            if lost and any(line.endswith(lost) for line in log.read_text().splitlines()):
                cluster.remove_node(other, allow_graceful=False)
                lost = ""
        ray.shutdown()
    assert not lost and [number for number, _ in found] == list(range(40))
    assert other.node_id in log.read_text() and found[-1][1] != other.node_id


DRIVER = """
import sys, torch
from pathlib import Path
from test_executor import Resources, executor, judged
torch.set_num_threads(1)
judged(Path(sys.argv[1]), Path(sys.argv[2]), executor.mapper(Resources(executor="ray", address=sys.argv[3])))
"""


@pytest.mark.soak
def test_a_lost_head_loses_nothing_that_was_published(base, tmp_path):
    folder, env = tmp_path / "there", os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
    with cluster_of(1) as cluster:
        command = [sys.executable, "-c", DRIVER, base, folder, cluster.address]
        driver = subprocess.Popen(command, cwd=Path(__file__).parent, env=env)
        while driver.poll() is None and not (folder / "A.jsonl").exists():
            time.sleep(0.02)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        driver.wait(200)
    before = disk.read_jsonl(folder / "A.jsonl")
    torch.set_num_threads(1)
    assert driver.returncode and 0 < len(before) and not (folder / "B.jsonl").exists()
    assert judged(base, folder, map) == judged(base, tmp_path / "here", map)
    assert disk.read_jsonl(folder / "A.jsonl")[: len(before)] == before
