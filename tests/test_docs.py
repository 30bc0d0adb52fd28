"What the pages say is so: commands and options exist, links lead somewhere, README and exit codes are today's."

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from so8t import cli
from so8t.flow import runner

ROOT = Path(__file__).parents[1]
NAMES = ("index", "tutorial", "add_a_stage", "architecture", "schema", "commands", "unattended", "scale", "limits")
PAGES = {name: ROOT / "nbs" / f"{name}.ipynb" for name in NAMES}


def text_of(page: Path) -> str:
    "The markdown of a notebook."
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def commands(text: str) -> list[list[str]]:
    "The so8t command lines of a text: in code spans, and at the start of lines in blocks."
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = [re.match(r"(?:\$ )?(?:\.venv[/\\](?:bin|Scripts)[/\\])?so8t (.+)", line) for line in lines]
    return [shlex.split(match[1].partition("  #")[0], posix=False) for match in found if match]


def understood(words: list[str]) -> bool:
    "Whether the command exists and knows these options."
    return CliRunner().invoke(cli.app, [*words, "--help"]).exit_code == 0


@pytest.mark.parametrize("page", ["index", "tutorial", "add_a_stage", "architecture", "unattended"])
def test_every_command_of_the_pages_exists(page):
    found = commands(text_of(PAGES[page]))
    assert found and [words for words in found if not understood(words)] == []


def test_a_command_that_does_not_exist_is_seen():
    text = "Say `so8t run my.yaml --frce sft`.\n```\n$ so8t rum\n.venv\\Scripts\\so8t run configs\\smol.yaml\n```"
    assert [understood(words) for words in commands(text)] == [False, True, False]


def test_the_readme_names_every_command():
    known = typer.main.get_command(cli.app).commands
    assert set(known) <= {words[0] for words in commands(text_of(PAGES["index"]))}


def exit_codes(text: str) -> dict[str, str]:
    "The table of exit codes in a text."
    table = text.partition("| code | meaning |")[2]
    return dict(re.findall(r"^\| (\d+) \| (.+) \|$", table, re.MULTILINE))


def test_exit_codes_are_those_of_the_program():
    said = exit_codes(text_of(PAGES["index"]))
    assert said == exit_codes(text_of(ROOT / "nbs" / "cli.ipynb"))
    codes = {runner.FINISHED, runner.FAILED, runner.INTERRUPTED, cli.DAMAGED, cli.Problem("").code, 70}
    assert set(map(int, said)) == codes


def links(text: str) -> list[str]:
    "The relative links in a text."
    prose = re.sub(r"```.*?```|`[^`\n]+`", "", text, flags=re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith(("http:", "https:"))]


@pytest.mark.parametrize("page", [*PAGES.values(), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8") if page.suffix == ".md" else text_of(page)
    headings = {re.sub(r"\s+", "-", title.strip()) for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for link in links(text):
        there = link[1:] in headings if link.startswith("#") else (page.parent / link).is_file()
        assert there, f"{page.name}: {link} leads nowhere"


def rendered() -> str:
    "README.md as `make readme` would write it."
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.readme()


def test_the_readme_is_what_its_notebook_renders_to():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == rendered(), "run `make readme`"


@pytest.mark.parametrize("page", ["schema", "commands"])
def test_a_reference_shows_what_the_program_says_today(page):
    cells = [c for c in json.loads(PAGES[page].read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    known = {}
    for cell in cells[:-1]:
        exec("".join(cell["source"]), known)
    *before, last = "".join(cells[-1]["source"]).strip().splitlines()
    exec("\n".join(before), known)
    assert "".join(cells[-1]["outputs"][0]["data"]["text/markdown"]) == eval(last, known).data


def test_the_pages_point_to_nothing_outside_but_the_wheels_of_torch():
    texts = [*map(text_of, PAGES.values()), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")]
    outside = {link for text in texts for link in re.findall(r"https?://[^\s)`\"]+", text)}
    assert outside == {"https://download.pytorch.org/whl/cu130"}
