"""What `hypermask-fast env` and `python -m hypermask_fast.env` say."""

import subprocess
import sys

import torch

from hypermask_fast import cli


def test_env_tells_versions_and_threads(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert f"{torch.get_num_threads()} threads" in shown


def test_env_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hypermask_fast.env"], capture_output=True, text=True, check=True)
    assert torch.__version__ in done.stdout
