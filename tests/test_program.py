"""The command as it is installed, and as a module: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypermask_fast import __version__
from hypermask_fast.training.config import presets

ROOT = Path(__file__).parents[1]
RUN_COMMAND = "import sys; from hypermask_fast.cli import main; sys.exit(main())"  # as its script does


@pytest.mark.parametrize("words", [["-m", "hypermask_fast"], ["-m", "hypermask_fast.cli"], ["-c", RUN_COMMAND]])
def test_runs_as_a_module_and_as_the_installed_command(words):
    done = subprocess.run([sys.executable, *words, "train", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("hypermask-fast: error: unknown preset 'nothing'")


@pytest.mark.skipif(sys.platform != "linux", reason="pipes and full disks as Linux has them")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_goes_nowhere(unbuffered):
    reading, nobody_reads = os.pipe()
    os.close(reading)
    outcomes = []
    for output in (nobody_reads, os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run(
            [sys.executable, "-m", "hypermask_fast", "presets"],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        os.close(output)
        outcomes.append((done.returncode, done.stderr))
    assert outcomes == [(141, ""), (2, "hypermask-fast: error: standard output: No space left on device\n")]


def test_wide_tables_are_not_cut_in_a_pipe():
    done = subprocess.run(
        [sys.executable, "-m", "hypermask_fast", "presets"],
        env=os.environ | {"COLUMNS": "20", "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == [f"{name:<23}  {config.title}" for name, config in presets().items()]


_SETUP = """
import runpy, sys
sys.modules["torch"] = None  # an isolated build has none
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def test_a_build_knows_the_version_without_importing_the_package():
    pytest.importorskip("setuptools")
    done = subprocess.run([sys.executable, "-c", _SETUP], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == [__version__], done.stderr


_IMPORTING = """
import torch
from torch.overrides import TorchFunctionMode

class Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor), function
        return result

with Watch():
    import hypermask_fast.cli
"""


def test_importing_makes_no_tensor():
    """PyTorch reads its allocator's settings at the first CPU tensor: a program must be able to come before it."""
    done = subprocess.run([sys.executable, "-c", _IMPORTING], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_importing_the_library_loads_no_package_of_an_extra():
    program = "import sys, hypermask_fast; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    packages = {"sklearn", "scipy", "PIL", "matplotlib", "rich", "tomli_w", "tensorboard", "hypermask_fast.training"}
    assert not packages & set(done.stdout.split())
