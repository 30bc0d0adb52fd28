"The same results on one machine and on a cluster of several, one of which is killed."

import hashlib
import json
import sys
import time
from pathlib import Path

import pytest

from so8t.data.executor import file_parts, map_parts
from so8t.flow.problem import Problem


def digest(part: int) -> str:
    return hashlib.sha256(str(part).encode()).hexdigest()


def slow(part: int) -> dict:
    "Takes a while, and leaves a mark of each time that it was begun."
    import ray

    node = ray.get_runtime_context().get_node_id()
    with (Path(FOLDER) / "begun").open("a") as file:
        file.write(json.dumps([part, node]) + "\n")
    time.sleep(0.4)
    return {"part": part, "digest": hashlib.sha256(str(part).encode()).hexdigest()}


def test_results_come_in_order_and_faults_come_out():
    assert map_parts(digest, range(20)) == [digest(i) for i in range(20)]
    with pytest.raises(ValueError):
        map_parts(int, ["1", "one"])
    with pytest.raises(Problem, match="must be local or ray"):
        map_parts(digest, [1], "slurm")


def test_without_ray_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Problem, match=r"so8t\[ray\]"):
        map_parts(digest, [1], "ray")


def test_what_is_there_is_not_done_again(tmp_path):
    file_parts(digest, range(6), tmp_path)
    (tmp_path / "000003.json").unlink()
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert file_parts(digest, range(6), tmp_path) == [digest(i) for i in range(6)]
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.soak
def test_a_killed_node_of_a_cluster_costs_nothing(tmp_path):
    ray = pytest.importorskip("ray", reason="extra ray is not installed")
    from threading import Thread

    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    found, source = [], slow
    globals_ = {"FOLDER": str(tmp_path)}
    source.__globals__.update(globals_)
    try:
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        ray.init(address=cluster.address, log_to_driver=False)
        work = Thread(target=lambda: found.extend(file_parts(slow, range(24), tmp_path / "results", "ray")))
        work.start()
        seen, deadline = set(), time.monotonic() + 60
        while nodes[0].node_id not in seen and time.monotonic() < deadline:
            time.sleep(0.1)
            begun = tmp_path / "begun"
            seen = {json.loads(line)[1] for line in begun.read_text().splitlines()} if begun.exists() else set()
        cluster.remove_node(nodes[0], allow_graceful=False)
        work.join(120)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert found == [{"part": i, "digest": digest(i)} for i in range(24)]
    rows = [json.loads(line) for line in (tmp_path / "begun").read_text().splitlines()]
    assert len({node for _, node in rows}) >= 2 and nodes[0].node_id in seen
    assert len(rows) > 24, "the killed node had a part in hand, which another one did again"
