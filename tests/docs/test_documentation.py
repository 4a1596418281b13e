"""What the documentation says can be done is done: its Python runs, its commands parse or run, its links lead there."""

import re
import shlex
import sys
import types
from pathlib import Path

import pytest
from markdown_blocks import Block, blocks_of, commands_of

from cockpit_bench import cli
from cockpit_bench.runlog import decode

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
SHORT_RUN = ["--steps", "3", "--panel", "light", "--threads", "1"]


def run_page(path: Path) -> list[str]:
    """Run the Python of a page in order in one namespace, and its commands that are marked; returns those commands."""
    module = types.ModuleType("page_" + path.stem)
    sys.modules[module.__name__] = module
    done = []
    try:
        for block in blocks_of(path):
            if block.language == "python":
                code = "\n" * (block.line - 1) + block.text  # so that a traceback has the line of the page
                exec(compile(code, str(path), "exec"), vars(module))
            elif block.mark == "runs":
                done += [run_command(command) for command in commands_of(block, "cockpit-bench")]
    finally:
        del sys.modules[module.__name__]
    return done


def run_command(command: str) -> str:
    words = shlex.split(command, comments=True)[1:]
    code = cli.main(words + (SHORT_RUN if words[0] == "run" else []))
    assert code == 0, f"'{command}' ended with exit code {code}"
    return command


def check_commands(path: Path) -> int:
    """Parse every call of the command line in a page; argparse exits where one is not understood."""
    commands = [command for block in blocks_of(path) for command in commands_of(block, "cockpit-bench")]
    for command in commands:
        cli.parser().parse_args(shlex.split(command, comments=True)[1:])
    return len(commands)


def check_records(path: Path) -> int:
    """Every line shown as one of the log is a record that this version writes and reads."""
    lines = [line for block in blocks_of(path) if block.language == "jsonl" for line in block.text.splitlines()]
    assert None not in [decode(line) for line in lines]
    return len(lines)


def dead_links(path: Path) -> list[str]:
    """Links to files of the project, and to headings in them, that lead nowhere."""
    dead = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        page = path.parent / name if name else path
        if not page.exists() or (heading and heading not in anchors(page)):
            dead.append(target)
    return dead


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(path)
    check_commands(path)
    check_records(path)
    assert dead_links(path) == []


def test_the_pages_have_something_to_test() -> None:
    python = [block for path in PAGES for block in blocks_of(path) if block.language == "python"]
    assert len(python) >= 10
    assert sum(check_commands(path) for path in PAGES) >= 6
    assert sum(check_records(path) for path in PAGES) >= 5


BROKEN = """\
<!-- python
x = 1
-->
```python
assert x == 2, "the second block"
```
<!-- runs -->
```sh
cockpit-bench list nonsense
```
```jsonl
{"kind": "reading", "instrument": "a/b", "step": 0, "seconds": 0.0, "status": "fine"}
```
[gone](gone.md) [no heading](page.md#elsewhere)
"""


def test_faults_of_a_page_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(BROKEN, encoding="utf-8")
    with pytest.raises(AssertionError, match="the second block"):
        run_page(page)
    with pytest.raises(SystemExit):
        check_commands(page)
    with pytest.raises(ValueError, match="fine"):
        check_records(page)
    assert dead_links(page) == ["gone.md", "page.md#elsewhere"]
    assert blocks_of(page)[2] == Block("sh", "cockpit-bench list nonsense", 9, "runs")
    with pytest.raises(AssertionError, match="exit code 2"):
        run_command(f"cockpit-bench show {tmp_path}")
