"""Stand-ins for `disk.steps` that kill, fail or keep a record, and a model of what a disk keeps in a power cut.

Run as a program, it performs one scenario and dies at one step: crashes.py SCENARIO FOLDER STEP PHASE
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from so8t.flow import disk
from so8t.flow.problem import Problem

NEW = {"step": 2, "note": "new " * 10}
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for thousands of small folders, where there is one

# ---- what is tried ----


class Scenario(NamedTuple):
    prepare: Callable[[Path], None]  # makes the old state
    act: Callable[[Path], None]  # makes the new one
    look: Callable[[Path], object]  # what a reader sees
    between: tuple = ()  # what else a reader may see until `act` has returned
    adds: bool = False  # done again, it adds to what is there
    right: Callable[[Path], None] | None = None  # makes the new state where `act` is a careless writer


def look_json(folder: Path):
    path = folder / "state.json"
    try:
        return disk.read_json(path) if path.exists() else "absent"
    except Problem as problem:
        return f"damaged: {problem}"


def look_rows(folder: Path):
    path = folder / "log.jsonl"
    try:
        return tuple(row["n"] for row in disk.read_jsonl(path)) if path.exists() else ()
    except Problem as problem:
        return f"damaged: {problem}"


def look_published(folder: Path):
    place = folder / "sft" / "abc"
    if not place.exists():
        return "absent"
    wrong = disk.verify(place)
    return f"damaged: {wrong}" if wrong else [path.read_bytes() for path in disk.files_below(place).values()][:-1]


def look_damaged(folder: Path):
    "As above; and the damaged folder, which may hold days of work, is never lost."
    assert [p for p in folder.glob("sft/abc*/old.bin") if p.read_bytes() == b"old, and damaged"], "the old one is lost"
    return look_published(folder)


def write_outside(path: Path, data: bytes):
    "A write by other people's code: nothing is synced. The stand-ins see it, so that they know what is on the disk."
    with disk.steps.open(path, "xb") as file:
        disk.steps.write(file, data)


def publish(folder: Path, publish_as=disk.publish):
    with publish_as(folder / "sft" / "abc", stage="sft") as staging:
        write_outside(staging / "config.json", b'{"rank": 16}')
        disk.steps.mkdir(staging / "deep")
        write_outside(staging / "deep" / "weights.bin", bytes(range(200)))


def prepare_damaged(folder: Path):
    with disk.publish(folder / "sft" / "abc", stage="sft") as staging:
        (staging / "old.bin").write_bytes(b"old, and whole")
    (folder / "sft" / "abc" / "old.bin").write_bytes(b"old, and damaged")


def prepare_rows(tail: bytes):
    return lambda folder: (folder / "log.jsonl").write_bytes(b'{"n": 1}\n{"n": 2}\n' + tail)


def append(*numbers: int, note: str = ""):
    return lambda folder: disk.append_jsonl(folder / "log.jsonl", *({"n": n, "note": note} for n in numbers))


def write(folder: Path):
    disk.write_json(folder / "state.json", NEW)


SCENARIOS = {
    "write a new file": Scenario(lambda folder: None, write, look_json),
    "write into a new folder": Scenario(
        lambda folder: None,
        lambda folder: write(folder / "run" / "sft"),
        lambda folder: look_json(folder / "run" / "sft"),
    ),
    "write over a file": Scenario(lambda folder: disk.write_json(folder / "state.json", {"step": 1}), write, look_json),
    "append the first row": Scenario(lambda folder: None, append(1), look_rows, adds=True),
    "append a row": Scenario(prepare_rows(b""), append(3), look_rows, adds=True),
    "append three rows": Scenario(prepare_rows(b""), append(3, 4, 5), look_rows, ((1, 2, 3), (1, 2, 3, 4)), adds=True),
    "append a long row": Scenario(prepare_rows(b""), append(3, note="long " * 2000), look_rows, adds=True),
    "append after a torn row": Scenario(prepare_rows(b'{"n": 3, "x": "' + b"x" * 50), append(4), look_rows, adds=True),
    "append after a row without its line end": Scenario(prepare_rows(b'{"n": 3}'), append(4), look_rows, adds=True),
    "publish": Scenario(lambda folder: (folder / "sft").mkdir(), publish, look_published),
    "publish over a damaged folder": Scenario(prepare_damaged, publish, look_damaged, ("absent",)),
    "publish over a whole folder": Scenario(publish, publish, look_published),
}


# ---- stand-ins for disk.steps ----


class Died(BaseException):
    "The process is gone: nothing that it would still have done happens."


class Watched:
    "Calls `around(label, do, args)` for each step. This one leaves out the syncs, for speed."

    syncs_folders = True

    def __init__(self):
        self.count = 0

    def __getattr__(self, label):
        do = getattr(disk.Steps(), label)

        def step(*args):
            self.count += 1
            return self.around(label, do, args)

        return step

    def around(self, label, do, args):
        return None if label.startswith("sync") else do(*args)


def half(label, do, args):
    "The beginning of a write, or of the removal of a folder."
    if label == "write":
        file, data = args
        do(file, data[: len(data) // 2])
    if label == "remove" and args[0].is_dir():
        do(next(path for path in sorted(args[0].rglob("*")) if path.is_file()))


class Killing(Watched):
    "Ends the process before a step, or in the midst of it."

    def __init__(self, at: int, phase: str):
        super().__init__()
        self.at, self.phase = at, phase

    def around(self, label, do, args):
        if self.count == self.at:
            if self.phase == "half":
                half(label, do, args)
            os.kill(os.getpid(), signal.SIGKILL) if hasattr(signal, "SIGKILL") else os._exit(9)
        return super().around(label, do, args)


class Failing(Watched):
    "One step fails as a bad or full disk does; `lasting`: so does each later one that takes room."

    def __init__(self, at: int, code: int, lasting: bool):
        super().__init__()
        self.at, self.code, self.lasting = at, code, lasting

    def around(self, label, do, args):
        takes_room = label not in ("remove", "truncate")
        if self.count == self.at or (self.lasting and self.count > self.at and takes_room):
            half(label, do, args)
            raise OSError(self.code, os.strerror(self.code))
        return super().around(label, do, args)


class Looking(Watched):
    "Looks, as a reader would, after each step and in the midst of each write."

    def __init__(self, look: Callable[[], object]):
        super().__init__()
        self.look, self.seen = look, []

    def around(self, label, do, args):
        if label == "write":
            file, data = args
            for part in (data[: len(data) // 2], data[len(data) // 2 :]):
                do(file, part)
                self.seen.append(self.look())
            return None
        result = super().around(label, do, args)
        self.seen.append(self.look())
        return result


class Recorder(Watched):
    "Keeps what was done, for `Disk` to replay. Steps in `skips` are forgotten by a careless writer."

    def __init__(self, log=(), dies_at: int = 0, skips: tuple = ()):
        super().__init__()
        self.log, self.dies_at, self.skips = list(log), dies_at, skips

    def around(self, label, do, args):
        if self.dies_at and self.count >= self.dies_at:
            raise Died
        if label in self.skips:
            return None
        first = Path(getattr(args[0], "name", args[0]) if label in ("write", "truncate", "sync") else args[0])
        if label == "open":
            if not first.exists():
                self.log.append(("create", first))
        elif label == "remove" and first.is_dir():
            self.log += [("remove", first / name) for name, entry in disk.below(first)] + [("remove", first)]
        elif label == "sync":
            self.log.append((label, first, first.read_bytes()))  # what had left the program by then
        else:
            self.log.append((label, first, *args[1:]))
        return super().around(label, do, args)


@contextmanager
def standing_in(steps):
    "Put a stand-in in the place of `disk.steps`."
    real, disk.steps = disk.steps, steps
    try:
        yield steps
    finally:
        disk.steps = real


# ---- what a disk keeps ----


@dataclass
class File:
    kept: bytes = b""
    pending: list = field(default_factory=list)  # (offset, data) of a write; (size, None) of a cut

    def content(self, changes=None) -> bytes:
        "What is in it after some changes, by default all, as a running program sees it."
        now = self.kept
        for place, data in self.pending if changes is None else changes:
            now = now[:place] if data is None else now[:place].ljust(place, b"\0") + data + now[place + len(data) :]
        return now

    def after_power_cut(self, cuts: int) -> set[bytes]:
        "Any of the changes that were not synced may be missing, and each write may be there in part, the rest blank."
        found = set()
        for chosen in itertools.product((False, True), repeat=len(self.pending)):
            there = list(itertools.compress(self.pending, chosen))
            found.add(self.content(there))
            for number, (place, data) in enumerate(there):
                for torn in parts(data or b"", cuts):
                    found.add(self.content([*there[:number], (place, torn), *there[number + 1 :]]))
        return found


def parts(data: bytes, cuts: int) -> Iterator[bytes]:
    for cut in [*range(0, len(data), max(1, len(data) // cuts)), len(data) - 1] if data else []:
        yield data[:cut]
        yield data[:cut] + bytes(len(data) - cut)
        if data.count(b"\n") < 2:
            yield bytes(cut) + data[cut:]


@dataclass
class Folder:
    kept: dict = field(default_factory=dict)  # name -> node
    pending: list = field(default_factory=list)  # changes of a dict of names, each in one step

    def names(self, chosen=None) -> dict:
        "The names after those changes that are chosen, by default all, as a running program sees them."
        now = dict(self.kept)
        for change in self.pending if chosen is None else itertools.compress(self.pending, chosen):
            change(now)
        return now

    def sync(self):
        "All its names are durable."
        self.kept, self.pending = self.names(), []


def link(name, node):
    return lambda names: names.__setitem__(name, node)


def unlink(name):
    return lambda names: names.pop(name, None)


def rename(old, new):
    def change(names):
        if old in names:
            names[new] = names.pop(old)

    return change


class Disk:
    "A disk that has the files of a folder, all durable, and on which recorded steps are replayed."

    def __init__(self, root: Path):
        self.root, self.top = root, self.load(root)

    def load(self, path: Path):
        if path.is_dir():
            return Folder({child.name: self.load(child) for child in path.iterdir()})
        return File(path.read_bytes())

    def node(self, path: Path):
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names()[name]
        return node

    def replay(self, label: str, path: Path, *rest):
        if label == "sync":
            node = self.node(path)
            node.kept, node.pending = rest[0], []
        elif label == "sync_folder":
            self.node(path).sync()
        elif label == "write":
            self.node(path).pending.append((len(self.node(path).content()), rest[0]))
        elif label == "truncate":
            self.node(path).pending.append((rest[0], None))
        else:
            change = {
                "create": lambda: link(path.name, File()),
                "mkdir": lambda: link(path.name, Folder()),
                "remove": lambda: unlink(path.name),
                "replace": lambda: rename(path.name, rest[0].name),
            }[label]()
            assert label != "replace" or path.parent == rest[0].parent
            self.node(path.parent).pending.append(change)

    def may_hold(self, node, hidden: bool, cuts: int) -> list:
        if isinstance(node, File):
            return sorted(node.after_power_cut(cuts))
        return list(self.after_power_cut(node, hidden, cuts))

    def after_power_cut(self, node=None, hidden: bool = True, cuts: int = 60) -> Iterator[dict]:
        """Every tree that may be found, as {name: bytes or tree}: any of the names that were not synced may be missing.
        What nobody reads is torn in fewer places, and without `hidden` left out."""
        node = node or self.top
        for chosen in itertools.product((False, True), repeat=len(node.pending)):
            names = {name: child for name, child in node.names(chosen).items() if hidden or name[0] != "."}
            choices = [
                self.may_hold(child, hidden, 4 if name.startswith(".") else cuts) for name, child in names.items()
            ]
            for picked in itertools.product(*choices):
                yield dict(zip(names, picked, strict=True))


def fingerprint(tree) -> object:
    return tuple(sorted((n, fingerprint(t)) for n, t in tree.items())) if isinstance(tree, dict) else tree


def materialise(tree: dict, folder: Path):
    folder.mkdir()
    for name, what in tree.items():
        if isinstance(what, dict):
            materialise(what, folder / name)
        else:
            (folder / name).write_bytes(what)


# ---- the program that is killed ----

if __name__ == "__main__":
    name, folder, at, phase = sys.argv[1:]
    with standing_in(Killing(int(at), phase)):
        SCENARIOS[name].act(Path(folder))

