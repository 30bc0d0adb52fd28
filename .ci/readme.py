"The README is nbs/index.ipynb as markdown, its links made to start at the top level."

import posixpath
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]


def readme() -> str:
    "What README.md has to say."
    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    links = re.compile(r"(?<=\]\()(?!https?:|#)([^)]+)")
    return links.sub(lambda link: posixpath.normpath(f"nbs/{link[1]}"), text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8", newline="\n")
