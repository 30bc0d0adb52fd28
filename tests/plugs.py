"Plugs pulled from pipelines until there were enough, for the bench notebooks: a row for each, and one for each run."

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
from test_kill_tiny import killed

BESIDE = 2  # workspaces that are tried side by side


def tried(make, wanted, how, room, lane, reference, mean):
    "Runs and kills until there were enough."
    hits, runs = [], []

    def wait():
        return 1 + random.expovariate(1 / mean)

    while len(hits) < wanted:
        workspace = make(Path(room) / f"{how[0]}-{lane}-{len(runs)}")
        try:
            mine = killed(workspace, wanted - len(hits), wait, how)
            same = workspace.digests() == reference
            runs.append({"kills": len(mine), "same artifacts": same, "stages repeated": len(workspace.repeated())})
            hits += [hit | {"run": f"{lane}-{len(runs)}"} for hit in mine]
        finally:
            workspace.leave()
    return hits, runs


def all_tried(make, wanted, how, room, reference, mean):
    "Two tables: what each kill hit, and how each run ended; a life lasts a second, and so many more on average."
    with ThreadPoolExecutor(BESIDE) as pool:
        each = (pool.submit(tried, make, wanted // BESIDE, how, room, lane, reference, mean) for lane in range(BESIDE))
        lanes = [lane.result() for lane in list(each)]
    return [pd.DataFrame([row for lane in lanes for row in lane[part]]) for part in (0, 1)]


def summary(hits, runs):
    return pd.Series(
        {
            "tried": len(hits),
            "runs": len(runs),
            "finished with the same artifacts": int(runs["same artifacts"].sum()),
            "finished stages that ran again": int(runs["stages repeated"].sum()),
            "most kills in one run": runs["kills"].max(),
        }
    )


def places(hits):
    table = hits.groupby("stage", sort=False)["lost"].agg(["count", "median", "max"]).round(1)
    return table.rename(columns={"count": "kills", "median": "lost, s (median)", "max": "lost, s (most)"})
