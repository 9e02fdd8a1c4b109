"""What `hypermask-fast env` and `python -m hypermask_fast.env` say."""

import subprocess
import sys

import torch

from hypermask_fast import cli
from hypermask_fast.ops import OPS, registry


def test_env_tells_versions_and_threads(capsys):
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown
    assert f"{torch.get_num_threads()} threads" in shown


def test_env_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "hypermask_fast.env"], capture_output=True, text=True, check=True)
    assert torch.__version__ in done.stdout


def test_env_tells_who_serves_which_op(capsys):
    assert cli.main(["env"]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    for backend in registry.BACKENDS[1:]:
        told = lines[f"backend {backend}"].strip()
        assert told.startswith("ready") if not registry.problem(backend) else registry.problem(backend) in told
    assert "masked_linear" in lines["backend plain"]
    served = {op for name in registry.BACKENDS[1:] if not registry.problem(name) for op in registry.served(name)}
    rest = lines["backend reference"].split(": ")[1].split(", ")
    assert set(rest) - {"nothing"} == OPS.keys() - served


def test_env_tells_an_unknown_backend_in_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("HYPERMASK_BACKEND", "tpu")
    assert cli.main(["env"]) == 0
    assert "tpu, which is none of auto, reference, " in capsys.readouterr().out
