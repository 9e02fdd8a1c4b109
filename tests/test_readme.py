"""README's examples do what they say, typed one after the other."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hypermask_fast import cli, commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


def test_the_python_blocks_run_in_order_in_one_process(tmp_path):
    """Those that need a GPU only where there is one."""
    blocks = [block for block in BLOCKS if 'device="cuda"' not in block or torch.cuda.is_available()]
    assert len(BLOCKS) >= 6 and len(BLOCKS) - len(blocks) <= 1
    numbered = enumerate(BLOCKS)
    script = "\n".join(f"print('block {i}', flush=True)\n{block}" for i, block in numbered if block in blocks)
    (tmp_path / "readme.py").write_text(script, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "readme.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("average accuracy") == 2
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {"task3.safetensors", "mine1.safetensors", "runs/half/metrics.json", "runs/mine/accuracy_matrix.png"} <= left


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_what_comments_say_of_an_export(tmp_path):
    """`value  # what it is` in the block of the exported network."""
    (block,) = (block for block in BLOCKS if 'load_exported("task3.safetensors")' in block)
    said = dict(re.findall(r"^(net\.exported\.\w+)  # (\(.*?\)|'.*?')", block, re.M))
    assert len(said) == 3
    script = (
        "from hypermask_fast.training.config import load_preset\n"
        "from hypermask_fast.training.run import export_task, train\n"
        "train(load_preset('split-digits').with_values({'training.iterations': 1}), 'run')\n"
        "export_task('run', 3, 'task3.safetensors')\n"
        f"{block}\nprint({', '.join(f'repr({value})' for value in said)}, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines() == list(said.values()), done.stderr


@pytest.mark.parametrize("line", re.findall(r"^ {4}hypermask-fast (.*)$", README, re.M))
def test_the_commands_are_ones(line, monkeypatch):
    """Their words are understood; what they do is tested elsewhere."""
    words, called = shlex.split(line.partition("#")[0].replace("> mine.toml", "")), []
    for command in commands.COMMANDS:
        name = "report" if command is commands.env else "_run"
        monkeypatch.setattr(command, name, lambda arguments: called.append(arguments) or 0)
    assert cli.main(words) == 0 and len(called) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("goal", ["help", "demo"])
def test_make_says_how_the_command_is_called(goal):
    words = ["make", "--dry-run", "VENV=environment", goal]
    text = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "environment/bin/hypermask-fast " in text and "source environment/bin/activate, hypermask-fast" in text
    assert "silent" in text or "pip says nothing meanwhile" in text
