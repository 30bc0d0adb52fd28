"What the system's schedulers are given: checked by the real program where it is here, else by its published contract."

import json
import os
import plistlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from so8t.ops import schedule

ODD = "50% \"öko\" 日本 $HOME & co's 100%%"
NS = "{http://schemas.microsoft.com/windows/2004/02/mit/task}"


def task_in(folder: Path, name: str = ODD) -> schedule.Task:
    "A task in a folder of that name, whose program writes down what it is called with."
    root = folder / name
    (root / "bin").mkdir(parents=True)
    program = root / "bin" / "so8t"
    told = f"json.dump([sys.argv[1:], os.getcwd()], open({str(folder / 'called.json')!r}, 'w'))"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{told}\n", encoding="utf-8")
    program.chmod(0o755)
    (root / "a b.yaml").touch()
    (root / "schedule").mkdir()
    return schedule.Task(root / "a b.yaml", root, root / "schedule", (str(program),))


# ---- systemd, by systemd ----


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("name", ["plain", "my work", ODD, "back\\slash"])
def test_systemd_accepts_the_units(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    plan = schedule.systemd(task_in(tmp_path, name))
    for path, text in plan.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)

    def verify():
        env = {**os.environ, "SYSTEMD_UNIT_PATH": f"{next(iter(plan.files)).parent}:", "XDG_RUNTIME_DIR": str(tmp_path)}
        words = ["systemd-analyze", "--user", "--recursive-errors=no", "verify", *map(str, plan.files)]
        return subprocess.run(words, capture_output=True, text=True, env=env)

    said = verify()
    assert said.returncode == 0 and "so8t-" not in said.stderr, said.stderr
    service = next(path for path in plan.files if path.suffix == ".service")
    service.write_text(service.read_text(encoding="utf-8").replace("/bin/sh", "/bin/shh"), encoding="utf-8")
    assert verify().returncode != 0, "a mistake is seen"


def unquoted(line: str) -> list[str]:
    'Words of ExecStart, by systemd.service, "Command lines": quotes, C escapes, %% and $$.'
    words = [a or b for a, b in re.findall(r"""'([^']*)'|"((?:[^"\\]|\\.)*)"|\S+""", line)]
    return [re.sub(r"\\(.)", r"\1", w).replace("%%", "%").replace("$$", "$") for w in words if w]


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_the_service_calls_what_was_meant(tmp_path):
    task = task_in(tmp_path)
    text = next(t for p, t in schedule.systemd(task).files.items() if p.suffix == ".service").decode()
    words = unquoted(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
    subprocess.run(["/bin/sh", "-c", *words], check=True, cwd=tmp_path)
    assert json.loads((tmp_path / "called.json").read_text()) == [["run", str(task.config)], str(tmp_path)]
    assert f"WorkingDirectory={str(task.root).replace('%', '%%')}\n" in text


# ---- Windows, by the published Task Scheduler Schema: those of its parts that a task of ours may use ----

BOOL, DURATION, TEXT = r"true|false", r"PT\d+[SMH]", r"(?s).+"
# element: (children may come in any order, {child: (required, pattern of its text; None: it has children)})
RULES = {
    "Task": (True, {**dict.fromkeys(("RegistrationInfo", "Triggers", "Principals", "Settings", "Data"), (0, None)),
                    "Actions": (1, None)}),
    "RegistrationInfo": (True, dict.fromkeys(("URI", "Source", "Author", "Version", "Description"), (0, TEXT))),
    "Triggers": (True, {"BootTrigger": (0, None), "LogonTrigger": (0, None)}),
    "BootTrigger": (False, {"Enabled": (0, BOOL), "StartBoundary": (0, TEXT), "EndBoundary": (0, TEXT),
                            "Repetition": (0, None), "ExecutionTimeLimit": (0, DURATION), "Delay": (0, DURATION)}),
    "LogonTrigger": (False, {"Enabled": (0, BOOL), "StartBoundary": (0, TEXT), "EndBoundary": (0, TEXT),
                             "Repetition": (0, None), "ExecutionTimeLimit": (0, DURATION), "UserId": (0, TEXT),
                             "Delay": (0, DURATION)}),
    "Principals": (False, {"Principal": (1, None)}),
    "Principal": (True, {"UserId": (0, TEXT), "LogonType": (0, "S4U|Password|InteractiveToken"), "GroupId": (0, TEXT),
                         "RunLevel": (0, "LeastPrivilege|HighestAvailable")}),
    "Settings": (True, {
        "MultipleInstancesPolicy": (0, "Parallel|Queue|IgnoreNew|StopExisting"), "RestartOnFailure": (0, None),
        "ExecutionTimeLimit": (0, DURATION), "Priority": (0, r"\d|10"),
        **dict.fromkeys(("AllowStartOnDemand", "DisallowStartIfOnBatteries", "StopIfGoingOnBatteries",
                         "AllowHardTerminate", "StartWhenAvailable", "RunOnlyIfNetworkAvailable", "WakeToRun",
                         "Enabled", "Hidden", "RunOnlyIfIdle"), (0, BOOL))}),
    "RestartOnFailure": (True, {"Interval": (1, DURATION), "Count": (1, r"[1-9]\d{0,2}")}),
    "Actions": (True, {"Exec": (1, None)}),
    "Exec": (True, {"Command": (1, r".{1,260}"), "Arguments": (0, TEXT), "WorkingDirectory": (0, r".{1,260}")}),
}


def mistakes(node) -> list[str]:
    "What breaks the rules, below an element."
    name = node.tag.removeprefix(NS)
    any_order, children = RULES[name]
    tags = [child.tag.removeprefix(NS) for child in node]
    found = [f"{name} lacks {tag}" for tag, (required, _) in children.items() if required and tag not in tags]
    found += [f"{name} has {tag} twice" for tag in set(tags) if tags.count(tag) > 1]
    if not any_order and tags != [tag for tag in children if tag in tags]:
        found.append(f"{name}: {', '.join(tags)} in this order")
    for tag, child in zip(tags, node, strict=True):
        if tag not in children:
            found.append(f"{name} knows no {tag}")
        elif children[tag][1] is None:
            found += mistakes(child)
        elif len(child) or not re.fullmatch(children[tag][1], child.text or ""):
            found.append(f"{tag}: {child.text!r}")
    return found


@pytest.mark.parametrize("startup", [True, False])
@pytest.mark.parametrize("highest", [True, False])
def test_the_xml_follows_the_schema(tmp_path, startup, highest):
    task = task_in(tmp_path)
    data = schedule.windows_xml(task, "PC\\me & you", startup, highest)
    assert data.startswith(b"\xff\xfe"), "UTF-16 with a mark, as the first line says"
    root = ElementTree.fromstring(data)
    assert root.tag == f"{NS}Task" and root.get("version") == "1.3" and mistakes(root) == []
    principal, actions = root.find(f".//{NS}Principal"), root.find(f"{NS}Actions")
    assert actions.get("Context") == principal.get("id")
    assert root.findtext(f".//{NS}Command") == str(task.folder / f"{task.name}.bat")
    assert root.findtext(f".//{NS}WorkingDirectory") == str(task.root)
    triggers = [t.tag.removeprefix(NS) for t in root.find(f"{NS}Triggers")]
    assert triggers == ["BootTrigger"] * startup + ["LogonTrigger"]
    assert principal.findtext(f"{NS}LogonType") == ("S4U" if startup else "InteractiveToken")
    assert principal.findtext(f"{NS}RunLevel") == ("HighestAvailable" if highest else "LeastPrivilege")
    wanted = {"DisallowStartIfOnBatteries": "false", "StopIfGoingOnBatteries": "false",
              "RunOnlyIfNetworkAvailable": "true", "ExecutionTimeLimit": "PT0S"}
    assert {name: root.findtext(f"{NS}Settings/{NS}{name}") for name in wanted} == wanted
    restart = root.find(f"{NS}Settings/{NS}RestartOnFailure")
    assert [restart.findtext(f"{NS}{n}") for n in ("Interval", "Count")] == ["PT5M", "3"]


def test_a_broken_rule_is_seen():
    page = schedule.windows_xml(schedule.Task(Path("/a.yaml"), Path("/"), Path("/s"), ("so8t",)), "me", True, False)
    text = page.decode("utf-16").split("\n", 1)[1]
    enabled, delay = "<Enabled>true</Enabled>", "<Delay>PT1M</Delay>"
    for old, new in ((f"{enabled}\r\n      {delay}", delay + enabled), ("PT5M", "5 minutes"), ("IgnoreNew", "Ignore"),
                     ("<Count>3</Count>", ""), ("<Hidden>false</Hidden>", "<Secret>false</Secret>")):
        broken = text.replace(old, new)
        assert broken != text and mistakes(ElementTree.fromstring(broken)), old


def test_the_bat_is_utf_8_and_hands_on_the_exit_code():
    root = Path("C:/my 50% work")
    task = schedule.Task(root / "日本.yaml", root, root / "s", ("C:/my 50% work/so8t.exe",))
    lines = schedule.windows_bat(task).decode().split("\r\n")
    assert lines[:3] == ["@echo off", "chcp 65001 >nul", "set PYTHONUTF8=1"] and lines[-2:] == ["exit /b %CODE%", ""]
    call = next(i for i, line in enumerate(lines) if '"run"' in line)
    assert lines[call].replace("%%", "%").startswith('"C:/my 50% work/so8t.exe" "run" ') and "日本.yaml" in lines[call]
    assert lines[call].endswith(f'>> "{str(task.log).replace("%", "%%")}" 2>&1')
    assert lines[call + 1] == "set CODE=%ERRORLEVEL%"
    variables = {"DATE", "TIME", "ERRORLEVEL", "CODE"}
    left = [part for line in lines for part in re.findall(r"%(\w+)%", line.replace("%%", ""))]
    assert set(left) == variables, "every other % is doubled"


# ---- launchd and cron ----


def test_launchd_gets_a_property_list(tmp_path):
    task = task_in(tmp_path)
    (path, text), = schedule.launchd(task).files.items()
    agent = plistlib.loads(text)
    assert path.stem == agent["Label"] and agent["ProgramArguments"] == task.words and agent["RunAtLoad"] is True
    assert agent["WorkingDirectory"] == str(task.root)


@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_the_line_for_cron_calls_what_was_meant(tmp_path):
    task = task_in(tmp_path)
    line, = schedule.cron(task).files.values()
    assert line.count(b"\n") == 1 and line.startswith(b"@reboot sleep 60; ")
    command = re.sub(r"(?<!\\)%.*", "", line.decode().removeprefix("@reboot sleep 60; ")).replace(r"\%", "%")
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert json.loads((tmp_path / "called.json").read_text()) == [["run", str(task.config)], str(task.root)]
    assert task.log.exists()


CRONTAB = """#!/bin/sh
[ "$1" = -l ] && exec cat "{table}"
cat > "{table}.new" && mv "{table}.new" "{table}"
"""


@pytest.mark.skipif(os.name == "nt" or Path("/run/systemd/system").is_dir(), reason="another scheduler comes first")
def test_the_command_installs_replaces_and_removes(tmp_path, monkeypatch):
    "crontab is a stand-in (`-l` prints the table, `-` reads a new one): a real one would change the tester's table."
    from garden import Garden

    garden, table = Garden(tmp_path / "my 50% work"), tmp_path / "table"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "crontab").write_text(CRONTAB.format(table=table))
    (tmp_path / "bin" / "crontab").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    table.write_text("0 3 * * * backup  # so8t-like\n")
    shown = garden.so8t("schedule", "install", "--dry-run")
    assert shown.returncode == 0 and "@reboot" in shown.stdout and table.read_text().count("\n") == 1, shown.stderr
    assert "not installed" in garden.so8t("schedule", "status").stdout
    for _ in range(2):
        assert garden.so8t("schedule", "install").returncode == 0
    backup, mine = table.read_text().splitlines()
    assert backup.endswith("so8t-like") and f"{mine}\n" in shown.stdout
    assert ": installed (" in garden.so8t("schedule", "status").stdout
    garden.config.rename(garden.config.with_name("other.yaml"))
    assert "no such configuration" in garden.so8t("schedule", "status", "garden").stderr
    garden.config.with_name("other.yaml").rename(garden.config)
    assert garden.so8t("schedule", "remove").returncode == 0
    assert table.read_text() == "0 3 * * * backup  # so8t-like\n"
    assert "not installed" in garden.so8t("schedule", "status").stdout
