"""Tables and progress on terminals, in pipes and in files, as a person or a script sees them."""

import os
import pty
import re
import subprocess
import sys

import pytest

from graftwork.cli.render import gib
from tests.process_races import ROOT

TABLE = """
from graftwork.cli.render import print_table
print_table("arms", ("task", "version", "note", "score", "tokens"), [
    ["airport-card-with-a-long-name", "ea7947a15036", "a text that is far too long for any narrow terminal " * 3,
     "0.892 [0.861, 0.939]", "12,345"],
    ["ua-parse", "c0ffee123456", "[red]short[/red]", "0.1", "7"]])
"""
PROGRESS = """
import graftwork.cli.render as output
output.PLAIN_LINE_S = {every}
with output.progress_bar("compare", quiet={quiet}) as update:
    for done in range(5):
        update(done, 4, "base")
"""


def run(code: str, columns: int, *, terminal: bool) -> str:
    """What `code` prints on stdout and stderr, in a pipe or on a terminal."""
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, "-c", code]
    if not terminal:
        env.pop("COLUMNS")
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return done.stdout + done.stderr
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        said += part
    assert process.wait(60) == 0
    os.close(ours)
    return re.sub(r"\x1b\[[0-9;]*m", "", said.decode().replace("\r\n", "\n"))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_row_is_one_line_with_whole_numbers_and_names(terminal: bool) -> None:
    title, header, first, second = run(TABLE, 80, terminal=terminal).strip("\n").split("\n")
    assert title.strip() == "arms"
    assert header.split() == ["task", "version", "note", "score", "tokens"]
    for word in ("airport-card-with-a-long-name", "ea7947a15036", "0.892 [0.861, 0.939]", "12,345"):
        assert word in first
    assert "[red]" in second
    assert ("far too long for any narrow terminal" in first) != terminal
    assert ("…" in first) == terminal


def test_without_a_terminal_progress_is_lines_at_intervals() -> None:
    assert run(PROGRESS.format(every=60, quiet=False), 80, terminal=False).splitlines() == [
        "compare: 0 of 4, base",
        "compare: 4 of 4, base",
    ]
    assert len(run(PROGRESS.format(every=0, quiet=False), 80, terminal=False).splitlines()) == 5
    assert run(PROGRESS.format(every=0, quiet=True), 80, terminal=False) == ""


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(3 * 2**30, "3.00 GiB"), (2**20, "1.0 MiB"), (12292, "12.0 KiB"), (0, "0.0 KiB")]
)
def test_bytes_are_never_rounded_to_nothing(size_bytes: int, text: str) -> None:
    assert gib(size_bytes) == text
