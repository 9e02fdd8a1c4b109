"""The command as it is installed, and as a module: in processes of their own."""

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
