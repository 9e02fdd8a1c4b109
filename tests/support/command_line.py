"""Runs of the command line that are over in a moment."""

import contextlib
import io
import re
from pathlib import Path

from hypermask_fast import cli

SETTINGS = {
    "data.tasks": "2",
    "training.iterations": "8",
    "training.log_every": "4",
    "training.checkpoint_every": "3",
    "target.hidden": "[8]",
    "hypernet.hidden": "[4]",
    "hypernet.embedding": "3",
}
TINY = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def train(folder: Path, *options: str) -> int:
    return cli.main(["train", "split-digits", "--device", "cpu", "--out", str(folder), *TINY, *options])


def table(text: str) -> list[list[float]]:
    return [[float(cell) for cell in re.findall(r"\d+\.\d\d", line)] for line in text.splitlines()[1:]]


class InThisProcess:
    """Stands for subprocess.Popen of one of several runs: the command line, without loading PyTorch anew.

    What a run says to standard error is read as from its process; it ends before another one begins.
    """

    def __init__(self, words: list[str], **_: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            self.returncode = cli.main(words[words.index("train") :])
        self.stderr = io.StringIO(said.getvalue())

    def poll(self) -> int:
        return self.returncode
