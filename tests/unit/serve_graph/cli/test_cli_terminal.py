"""What a person sees in a terminal: a bar, a table; and that prompts can't draw in it."""

import contextlib
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import COMMAND
from scripted.service import ScriptedService

Shown = Callable[..., tuple[int, str]]


@pytest.fixture
def shown(environment: dict[str, str], tmp_path: Path) -> Shown:
    """Run a command in a terminal of its own; its exit code and what it showed."""

    def run(*arguments: str) -> tuple[int, str]:
        terminal, end = pty.openpty()
        env = {**environment, "TERM": "xterm", "COLUMNS": "120"}
        process = subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=env, stdin=end, stdout=end, stderr=end)
        os.close(end)
        screen = b""
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while some := os.read(terminal, 65_536):
                screen += some
        os.close(terminal)
        return process.wait(30), screen.decode()

    return run


def test_generate_shows_a_bar(shown: Shown, scripted: ScriptedService) -> None:
    code, screen = shown("generate", "a red circle", "-o", "clip.mp4")

    assert code == 0, screen
    assert "━" in screen
    assert "denoise" in screen
    assert "clip.mp4  (64x64" in screen


def test_batch_shows_a_table_with_its_counts(shown: Shown, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\nfail\n")
    code, screen = shown("batch", "prompts.txt", "-o", "out")

    assert code == 1, screen
    assert "succeeded" in screen
    assert "2 prompts  → out/" in screen
    assert "1 clips in out/, 1 without a clip" in screen


def test_generate_to_stdout_is_refused_in_a_terminal(shown: Shown, scripted: ScriptedService) -> None:
    code, screen = shown("generate", "a red circle", "-o", "-")

    assert (code, scripted.script.asked) == (2, [])
    assert "pipe it" in screen
