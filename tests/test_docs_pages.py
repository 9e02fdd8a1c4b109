"""docs/runs.md and docs/your-own.md: every block of code, typed one after the other in an empty folder."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hypermask_fast import cli
from hypermask_fast.commands import several

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page: str) -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


class InThisProcess:
    """Stands for the process of one of several runs, which would load PyTorch anew; tests/test_several.py has those."""

    stderr = ()

    def __init__(self, words, **_):
        self.returncode = cli.main(words[words.index("train") :])

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(text: str) -> None:
    for line in text.splitlines():
        program, *words = shlex.split(line)
        assert program == "hypermask-fast" and cli.main(words) == 0, line


def test_several_runs(empty, monkeypatch, capsys):
    monkeypatch.setattr(several.subprocess, "Popen", InThisProcess)
    shells = [text for kind, text in blocks("runs.md") if kind == "shell"]
    assert len(shells) == 4
    for text in shells:
        typed(text)
    assert {path.name for path in (empty / "runs" / "digits").iterdir()} == {
        *(f"seed-{seed}" for seed in range(4)),
        *("summary.json", "matrices.png", "accuracy.png"),
    }
    assert (empty / "runs" / "beta" / "method.beta=0.01" / "seed-0" / "metrics.json").is_file()
    assert (empty / "runs" / "beta-compared" / "differences.png").is_file()
    capsys.readouterr()
    for kind, text in blocks("runs.md"):
        if kind == "python":
            exec(compile(text, "docs/runs.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("Estimate(mean=") and shown[1].startswith("(") and 0 < float(shown[-1]) <= 100


def test_data_and_a_network_of_one_s_own(empty):
    found = blocks("your-own.md")
    assert [kind for kind, _ in found] == ["python", "shell", "shell"]
    (empty / "mine.py").write_text(found[0][1])
    pytest.importorskip("onnx", reason="the export to ONNX needs onnx")
    typed(found[1][1])
    assert (empty / "task1.onnx").is_file()
    for part, count in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog", "eel", "fox")):
            (empty / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng(9 * c + i).integers(0, 255, (20, 24 + i, 3), dtype=np.uint8)
                Image.fromarray(noise).save(empty / "pictures" / part / name / f"{i}.jpg")
    typed(found[2][1])


def test_what_the_pages_say_is_so():
    """The tables of arguments, and the settings of images."""
    page = (ROOT / "docs" / "your-own.md").read_text(encoding="utf-8")
    from hypermask_fast.training.config import DataConfig

    assert set(re.findall(r"^\| `data\.(\w+)", page, re.M)) == {"image_size", "colour", "normalise", "validation"}
    assert {"image_size", "colour", "normalise", "classes_per_task"} <= DataConfig.__dataclass_fields__.keys()
    arguments = re.findall(r"^\| (?:scenario|network)? ?\| `(\w+)`(?:, `(\w+)`)?", page, re.M)
    assert [name for pair in arguments for name in pair if name] == [
        *("data_dir", "seed", "validation", "tasks"),
        *("input_shape", "num_classes", "hidden", "width"),
    ]
