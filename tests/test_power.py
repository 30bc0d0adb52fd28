"configs/tiny.yaml, the power of its disk cut in the middle, ends with the same artifacts."

import random

import power
import pytest
from power import Cuttable
from test_kill_tiny import Workspace, killed

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not power.possible(), reason="only root may mount a disk")]


def test_thirty_cuts(tmp_path):
    undisturbed, hits = Workspace(tmp_path / "undisturbed"), 0
    undisturbed.finish()
    for number in range(30):
        workspace = Cuttable(tmp_path / str(number))
        try:
            hits += len(killed(workspace, 30 - hits, lambda: random.uniform(1, 25), how=["power"]))
            assert workspace.digests() == undisturbed.digests()
            assert workspace.repeated() == []
        finally:
            workspace.leave()
        if hits >= 30:
            break
    print(f"{hits} power cuts in {number + 1} runs, all finished with the same artifacts")
    assert hits == 30
