"""docs/runs.md and docs/your-own.md: every command, typed one after the other in an empty folder."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import InThisProcess

from hypermask_fast import cli
from hypermask_fast.commands import several

ROOT = Path(__file__).parents[2]


def text(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def typed(page: str, first: str = "", last: str = "") -> None:
    """Runs the commands of a page, from the one that has the words `first` to the one that has `last`."""
    lines = re.findall(r"^ {4}hypermask-fast (.*)$", text(page), re.M)
    begin = next(i for i, line in enumerate(lines) if first in line)
    end = max(i for i, line in enumerate(lines) if last in line)
    for line in lines[begin : end + 1]:
        assert cli.main(shlex.split(line)) == 0, line


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_several_runs(empty, monkeypatch):
    monkeypatch.setattr(several.subprocess, "Popen", InThisProcess)
    typed("runs.md")
    assert {path.name for path in (empty / "runs" / "digits").iterdir()} == {
        *(f"seed-{seed}" for seed in range(4)),
        *("summary.json", "matrices.png", "accuracy.png"),
    }
    assert (empty / "runs" / "beta" / "method.beta=0.01" / "seed-0" / "metrics.json").is_file()
    assert (empty / "runs" / "beta-compared" / "differences.png").is_file()


def test_data_and_a_network_of_one_s_own(empty):
    (block,) = re.findall(r"^```python\n(.*?)^```$", text("your-own.md"), re.M | re.S)
    (empty / "mine.py").write_text(block)
    pytest.importorskip("onnx", reason="the export to ONNX needs onnx")
    typed("your-own.md", last="export runs/mine")
    assert (empty / "task1.onnx").is_file()
    for part, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog", "eel", "fox")):
            (empty / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng(9 * c + i).integers(0, 255, (20, 24 + i, 3), dtype=np.uint8)
                Image.fromarray(noise).save(empty / "pictures" / part / name / f"{i}.jpg")
    typed("your-own.md", first="--images")


def test_what_the_pages_say_is_so():
    """The tables of arguments, and the settings of images."""
    page = text("your-own.md")
    from hypermask_fast.training.config import DataConfig

    assert set(re.findall(r"^\| `data\.(\w+)", page, re.M)) == {"image_size", "colour", "normalise", "validation"}
    assert {"image_size", "colour", "normalise", "classes_per_task"} <= DataConfig.__dataclass_fields__.keys()
    arguments = re.findall(r"^\| (?:scenario|network)? ?\| `(\w+)`(?:, `(\w+)`)?", page, re.M)
    assert [name for pair in arguments for name in pair if name] == [
        *("data_dir", "seed", "validation", "tasks"),
        *("input_shape", "num_classes", "hidden", "width"),
    ]
