"""Fenced blocks of a Markdown file, with the line they start on and the comment that marks them."""

import re
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\s*$")
MARK = re.compile(r"^<!--\s*([\w-]+)\s*-->$")
HIDDEN = re.compile(r"^<!--\s*python\s*$")


@dataclass(frozen=True)
class Block:
    """`line` is the number of its first line of text; `mark` the word of an HTML comment right above the fence."""

    language: str
    text: str
    line: int
    mark: str


def blocks_of(path: Path) -> list[Block]:
    """All blocks of the file in order; a comment `<!-- python ... -->` is a block of Python that readers do not see."""
    found: list[Block] = []
    language, start, mark = "", 0, ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not start:
            if HIDDEN.match(line):
                language, start = "hidden", number + 1
            elif fence := FENCE.match(line):
                language, start = fence[1] or "none", number + 1
            elif line.strip():
                mark = m[1] if (m := MARK.match(line)) else ""
        elif line == ("-->" if language == "hidden" else "```"):
            text = "\n".join(lines[start - 1 : number - 1])
            found.append(Block("python" if language == "hidden" else language, text, start, mark))
            start, mark = 0, ""
    assert not start, f"{path}:{start}: a block that is not closed"
    return found


def commands_of(block: Block, program: str) -> list[str]:
    """The lines of a shell block that call the program, with continuations joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").strip() for line in lines if line.removeprefix("$ ").startswith(program + " ")]
