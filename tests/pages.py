"""The documentation as what can be tried: README.md and docs/*.md in the order they are read in."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.+?)\s*$", flags=re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the page, and the line its text begins at."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Command:
    """A `btpipe ...` line and the words a shell makes of it, without `btpipe`."""

    where: str
    line: str
    words: tuple[str, ...]


def pages() -> list[Path]:
    """README.md, then the pages of docs/: first as README.md links to them, then by name."""
    linked = [ROOT / link.partition("#")[0] for link in LINK.findall(README.read_text())]
    there = sorted((ROOT / "docs").glob("*.md"))
    return list(dict.fromkeys([README, *(page for page in linked if page in there), *there]))


def blocks(page: Path) -> Iterator[Block]:
    """Every fenced block of a page that names its language, in order."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        yield Block(page, line, match[1], match[2])


def commands(block: Block) -> Iterator[Command]:
    """The lines that begin with `btpipe `, each with those it goes on in after a backslash."""
    if block.language != "sh":
        return
    parts: list[str] = []
    for number, text in enumerate(block.text.splitlines(), block.line):
        parts.append(re.sub(r"\s#\s.*$", "", text).strip())
        if parts[-1].endswith("\\"):
            parts[-1] = parts[-1].removesuffix("\\").strip()
            continue
        line = " ".join(parts)
        if line.startswith("btpipe "):
            where = f"{block.page.relative_to(ROOT)}:{number - len(parts) + 1}"
            yield Command(where, line, tuple(shlex.split(line)[1:]))
        parts = []


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page may name after its #."""
    prose = FENCE.sub("", page.read_text())
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose)]
    return {heading.replace(" ", "-") for heading in plain}
