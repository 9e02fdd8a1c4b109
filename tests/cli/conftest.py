"""Fixtures of the command line's tests."""

from pathlib import Path

import pytest
from support.command_line import train

from hypermask_fast import cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run that no test changes."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder, "--seed", "3") == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Runs a command line that must be refused in one line with exit code 2; returns the line."""

    def run_refused(*words: object) -> str:
        assert cli.main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1
        return line

    return run_refused
