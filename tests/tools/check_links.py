"""Finds relative links in Markdown files that lead nowhere: to a missing file or a missing heading."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = {".git", ".venv", ".venv-clients", ".venv-images", "node_modules", "build", "dist", ".pytest_cache"}

_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$")
_FENCE = re.compile(r"^\s*(```|~~~)")


def documents(root: Path) -> Iterator[Path]:
    """The Markdown files below `root`, without what is not ours."""
    for path in sorted(root.rglob("*.md")):
        if not SKIPPED & set(path.relative_to(root).parts):
            yield path


def prose(text: str) -> Iterator[tuple[int, str]]:
    """Line number and line, outside code blocks."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if _FENCE.match(line):
            inside = not inside
        elif not inside:
            yield number, line


def anchors(text: str) -> set[str]:
    """The anchors that a renderer makes of the headings."""
    found: set[str] = set()
    for _, line in prose(text):
        if match := _HEADING.match(line):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            base = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            name, count = base, 0
            while name in found:
                count += 1
                name = f"{base}-{count}"
            found.add(name)
    return found


def dead_links(path: Path) -> Iterator[str]:
    """A sentence for each link of a document that leads nowhere."""
    for number, line in prose(path.read_text(encoding="utf-8")):
        for target in _LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            file, _, anchor = target.partition("#")
            destination = (path.parent / file) if file else path
            if not destination.exists():
                yield f"{path}:{number}: {target}: there is no such file"
            elif (
                anchor
                and destination.suffix == ".md"
                and anchor not in anchors(destination.read_text(encoding="utf-8"))
            ):
                yield f"{path}:{number}: {target}: there is no such heading"


def main(root: Path = ROOT) -> int:
    """Print every dead link; 1 when there is one."""
    dead = [problem for path in documents(root) for problem in dead_links(path)]
    print("\n".join(dead) if dead else "all relative links lead somewhere")
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
