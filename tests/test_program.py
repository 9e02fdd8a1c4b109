"""The command as it is installed, and as a module: in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUN_COMMAND = "import sys, hypermask_fast_main as program; sys.exit(program.main())"  # as its script does


@pytest.mark.parametrize("words", [["-m", "hypermask_fast"], ["-m", "hypermask_fast.cli"], ["-c", RUN_COMMAND]])
def test_runs_as_a_module_and_as_the_installed_command(words):
    done = subprocess.run([sys.executable, *words, "train", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("hypermask-fast: error: unknown preset 'nothing'")


def test_control_c_while_pytorch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {RUN_COMMAND}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nhypermask-fast: interrupted\n")


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
