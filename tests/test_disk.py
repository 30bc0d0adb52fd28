"Durable files on other systems, with odd names and sizes, and damaged in every byte."

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from crashes import Watched, standing_in

from so8t.flow import disk
from so8t.flow.problem import Problem


@pytest.fixture
def adapter(tmp_path) -> Path:
    "A small published folder."
    with disk.publish(tmp_path / "adapter", stage="sft", loss=1.9) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "weights.bin").write_bytes(bytes(range(64)))
        (staging / "config.json").write_bytes(b"{}")
    return tmp_path / "adapter"


# ---- damage ----


def test_every_byte_that_changes_is_seen(adapter):
    manifest, flips = disk.read_manifest(adapter), 0
    for path in disk.files_below(adapter).values():
        good = path.read_bytes()
        for place in range(len(good)):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            flips += 1
            if not disk.verify(adapter):
                assert path.name == disk.MANIFEST and disk.read_manifest(adapter) == manifest, place
        path.write_bytes(good)
    assert disk.verify(adapter) == [] and flips > 500


def test_a_manifest_cut_anywhere_is_seen(adapter):
    path = adapter / disk.MANIFEST
    good = path.read_bytes()
    for size in range(len(good)):
        path.write_bytes(good[:size])
        assert disk.verify(adapter) != [], size


def test_each_damage_is_named(adapter):
    (adapter / "config.json").unlink()
    (adapter / "deep" / "weights.bin").write_bytes(b"short")
    (adapter / "new.txt").touch()
    (adapter / ".DS_Store").touch()
    assert disk.verify(adapter) == [
        "config.json: missing",
        "deep/weights.bin: 5 bytes, not 64",
        "extra file new.txt",
    ]
    assert disk.verify(adapter / "nowhere") == ["manifest.json missing"]


def test_a_folder_of_a_newer_version_is_refused(adapter):
    manifest = disk.read_manifest(adapter)
    disk.write_json(adapter / disk.MANIFEST, {**manifest, "format": 2})
    with pytest.raises(Problem, match="made by a newer so8t"):
        disk.read_manifest(adapter)


def test_the_digest_is_of_the_content_alone(adapter, tmp_path):
    with disk.publish(tmp_path / "other", stage="another") as staging:
        (staging / "config.json").write_bytes(b"{}")
        (staging / "deep").mkdir()
        (staging / "deep" / "weights.bin").write_bytes(bytes(range(64)))
    assert disk.read_manifest(tmp_path / "other")["digest"] == disk.read_manifest(adapter)["digest"]


def test_damaged_folders_are_kept_one_by_one(adapter):
    for _ in range(2):
        (adapter / "config.json").unlink()
        with disk.publish(adapter) as staging:
            (staging / "config.json").touch()
    assert disk.verify(adapter) == []
    assert [p.name for p in sorted(adapter.parent.glob("adapter.*"))] == ["adapter.damaged-1", "adapter.damaged-2"]


# ---- what cannot be published ----


def links(staging: Path):
    (staging / "model.bin").symlink_to(sys.executable)


def folder_links(staging: Path):
    (staging / "model").symlink_to(staging.parent, target_is_directory=True)


def pipes(staging: Path):
    os.mkfifo(staging / "pipe")


def named(name: str):
    return lambda staging: (staging / name).touch()


@pytest.mark.skipif(os.name == "nt", reason="Windows refuses to make them")
@pytest.mark.parametrize(
    "make", [links, folder_links, pipes, *map(named, ["a\nb", "a:b", "a\\b", "a ", "a\udcff", disk.MANIFEST, ".tmp-a"])]
)
def test_odd_things_are_refused_and_nothing_is_published(tmp_path, make):
    with pytest.raises(Problem, match="cannot be published"), disk.publish(tmp_path / "odd") as staging:
        make(staging)
    assert list(tmp_path.iterdir()) == []


def test_what_no_manifest_can_say_is_refused_before_the_work(tmp_path):
    for info in ({"loss": object()}, {"files": {}}):
        with pytest.raises(TypeError), disk.publish(tmp_path / "never", **info):
            pytest.fail("the work had begun")


def test_a_full_disk_met_by_other_peoples_code_is_a_problem(tmp_path):
    with pytest.raises(Problem, match="no room: .*sft"), disk.publish(tmp_path / "sft") as staging:
        (staging / "half.bin").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_write_protected_disk_is_a_problem(tmp_path):
    class Protected(Watched):
        def around(self, label, do, args):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for write in (lambda path: disk.write_json(path, 1), lambda path: disk.append_jsonl(path, {})):
        with standing_in(Protected()), pytest.raises(Problem, match="state.json.*: the disk is write-protected"):
            write(tmp_path / "state.json")


# ---- other systems ----


class Windows(Watched):
    "No sync of folders; a viewer holds each file that is to be replaced, for a moment; `spoils` what is given a name."

    syncs_folders = False

    def __init__(self, holds: int = 0, spoils: bool = False):
        super().__init__()
        self.holds, self.spoils = holds, spoils

    def around(self, label, do, args):
        assert label != "sync_folder"
        if label == "replace":
            if self.holds:
                self.holds -= 1
                raise PermissionError(errno.EACCES, "used by another process", str(args[0]))
            do(*args)
            if self.spoils:
                spoiled = args[1] / "a.bin" if args[1].is_dir() else args[1]
                spoiled.write_bytes(b"spoiled")
            return None
        return do(*args)


def write_both(folder: Path):
    disk.write_json(folder / "state.json", {"step": 1})
    with disk.publish(folder / "sft") as staging:
        (staging / "a.bin").write_bytes(b"a")


def test_a_viewer_that_holds_the_file_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(disk.time, "sleep", waits.append)
    with standing_in(Windows(holds=3)):
        write_both(tmp_path)
    assert disk.read_json(tmp_path / "state.json") == {"step": 1} and disk.verify(tmp_path / "sft") == []
    assert waits == sorted(waits) and len(waits) == 3


def test_a_viewer_that_never_lets_go_is_an_error_and_the_old_state_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(disk.time, "sleep", lambda _: None)
    disk.write_json(tmp_path / "state.json", {"step": 0})
    with standing_in(Windows(holds=100)), pytest.raises(PermissionError, match="state.json"):
        disk.write_json(tmp_path / "state.json", {"step": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert disk.read_json(tmp_path / "state.json") == {"step": 0}


def test_where_no_folder_can_be_synced_it_is_read_back(tmp_path):
    with standing_in(Windows(spoils=True)):
        with pytest.raises(OSError, match="reads back differently.*state.json"):
            disk.write_json(tmp_path / "state.json", {"step": 1})
        with pytest.raises(OSError, match="reads back differently: a.bin.*sft"):
            with disk.publish(tmp_path / "sft") as staging:
                (staging / "a.bin").write_bytes(b"a")


def test_macos_is_asked_to_go_through_the_drives_cache(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(disk, "F_FULLFSYNC", 51)
    monkeypatch.setattr(disk, "fcntl", lambda descriptor, command: asked.append(command), raising=False)
    disk.write_json(tmp_path / "state.json", 1)
    assert asked == [51]


def test_macos_falls_back_where_the_file_system_does_not_know_it(tmp_path, monkeypatch):
    def unknown(descriptor, command):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    synced = []
    monkeypatch.setattr(disk, "F_FULLFSYNC", 51)
    monkeypatch.setattr(disk, "fcntl", unknown, raising=False)
    monkeypatch.setattr(disk.os, "fsync", synced.append)
    disk.write_json(tmp_path / "state.json", 1)
    assert len(synced) == 2


@pytest.mark.skipif(os.name == "nt", reason="no such permissions there")
def test_what_is_published_can_be_read_by_those_who_may_read_its_parent(adapter):
    plain = adapter.parent / "plain"
    plain.mkdir()
    assert adapter.stat().st_mode == plain.stat().st_mode


# ---- sizes, names, crowds ----


def test_a_system_that_takes_a_few_bytes_at_a_time_gets_them_all():
    class Reluctant:
        got = b""

        def write(self, data):
            self.got += data[:7]
            return len(data[:7])

    disk.Steps().write(file := Reluctant(), bytes(range(100)))
    assert file.got == bytes(range(100))


def test_very_many_files(tmp_path):
    with standing_in(Watched()), disk.publish(tmp_path / "many") as staging:
        for number in range(3000):
            (staging / f"{number:04}.txt").write_text(str(number), encoding="utf-8")
    assert len(disk.read_manifest(tmp_path / "many")["files"]) == 3000
    assert disk.verify(tmp_path / "many") == []


def test_a_large_file_is_never_in_memory(tmp_path):
    tracemalloc.start()
    with standing_in(Watched()), disk.publish(tmp_path / "large") as staging, (staging / "a.bin").open("wb") as file:
        file.truncate(2**27)
    assert disk.verify(tmp_path / "large") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("長" * 80 + ".json")
    disk.write_json(path, 1)
    assert disk.read_json(path) == 1


def test_many_writers_of_one_file_leave_one_whole_state(tmp_path):
    path = tmp_path / "state.json"
    disk.write_json(path, [0] * 500)

    def write(number):
        disk.write_json(path, [number] * 500)
        assert len(set(disk.read_json(path))) == 1

    with standing_in(Watched()), ThreadPoolExecutor(8) as crowd:
        list(crowd.map(write, range(200)))
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_any_text_comes_back_as_it_was(tmp_path):
    row = {"text": "half \ud83d, line\u2028break, \0, 薬\n", "number": 1e-300}
    disk.append_jsonl(tmp_path / "rows.jsonl", row, row)
    disk.write_json(tmp_path / "row.json", row)
    assert disk.read_jsonl(tmp_path / "rows.jsonl") == [row, row] and disk.read_json(tmp_path / "row.json") == row


# ---- rows ----


def test_a_last_row_torn_anywhere_is_left_out_and_healed(tmp_path):
    path, row = tmp_path / "rows.jsonl", json.dumps({"n": 2, "text": "薬" * 3}, ensure_ascii=False).encode()
    for size in range(len(row)):
        path.write_bytes(b'{"n": 1}\n' + row[:size])
        assert disk.read_jsonl(path) == [{"n": 1}]
        with standing_in(Watched()):
            disk.append_jsonl(path, {"n": 3})
        assert path.read_bytes() == b'{"n": 1}\n{"n": 3}\n', size


def test_another_torn_row_is_named_and_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2\n{"n": 3}\n')
    with pytest.raises(Problem, match="rows.jsonl: line 2 is not a JSON object"):
        disk.read_jsonl(path)
    disk.append_jsonl(path, {"n": 4})
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2\n{"n": 3}\n{"n": 4}\n'


def test_rows_longer_than_what_is_read_at_once_are_healed(tmp_path):
    path = tmp_path / "rows.jsonl"
    disk.append_jsonl(path, {"text": "x" * 100_000})
    with path.open("ab") as file:
        file.write(b'{"text": "' + b"y" * 50_000)
    disk.append_jsonl(path, {"text": "z"})
    assert [row["text"][0] for row in disk.read_jsonl(path)] == ["x", "z"]


def test_a_missing_file_is_named(tmp_path):
    for read in (disk.read_json, disk.read_jsonl):
        with pytest.raises(Problem, match="lost.json"):
            read(tmp_path / "lost.json")


# ---- looking again ----


def test_what_was_found_whole_is_not_hashed_again(adapter, tmp_path, monkeypatch):
    cache = tmp_path / "verified.json"
    assert disk.is_whole(adapter, cache)
    monkeypatch.setattr(disk, "damage", lambda *_: pytest.fail("hashed again"))
    assert disk.is_whole(adapter, cache)


@pytest.mark.parametrize("cause", ["time", "boot", "cache"])
def test_it_is_hashed_again(adapter, tmp_path, monkeypatch, cause):
    cache, hashed = tmp_path / "verified.json", []
    assert disk.is_whole(adapter, cache)
    monkeypatch.setattr(disk, "damage", lambda path, said: hashed.append(path.name))
    if cause == "time":
        os.utime(adapter / "config.json", (1, 1))
    if cause == "boot":
        monkeypatch.setattr(disk, "boot_id", lambda: "another")
    if cause == "cache":
        cache.write_bytes(b"[torn")
    assert disk.is_whole(adapter, cache) and sorted(hashed) == ["config.json", "weights.bin"]


def test_a_cache_that_cannot_be_written_does_no_harm(adapter):
    assert disk.is_whole(adapter, adapter / "config.json" / "verified.json")


def test_a_cache_forgets_folders_that_are_gone(adapter, tmp_path):
    cache = tmp_path / "verified.json"
    with disk.publish(tmp_path / "other"):
        pass
    assert disk.is_whole(tmp_path / "other", cache)
    (tmp_path / "other" / disk.MANIFEST).unlink()
    (tmp_path / "other").rmdir()
    assert disk.is_whole(adapter, cache) and not disk.is_whole(tmp_path / "other", cache)
    assert list(disk.read_json(cache)) == [str(adapter)]


def test_garbage_is_all_that_is_collected(adapter, tmp_path):
    (tmp_path / ".staging-a-0").mkdir()
    (adapter / ".tmp-b-0").touch()
    (tmp_path / ".keep").touch()
    assert {p.name for p in disk.collect_garbage(tmp_path)} == {".staging-a-0", ".tmp-b-0"}
    assert disk.verify(adapter) == [] and (tmp_path / ".keep").exists()


def test_it_is_imported_without_other_peoples_code():
    code = "import sys; before = set(sys.modules); import so8t.flow.disk; print(set(sys.modules) - before)"
    loaded = eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"so8t"}
