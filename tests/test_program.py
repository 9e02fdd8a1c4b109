"""The command as it is installed, and as a module: in processes of their own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hypermask_fast import __version__
from hypermask_fast.training import describe
from hypermask_fast.training.config import presets

ROOT = Path(__file__).parents[1]
RUN_COMMAND = "import sys; from hypermask_fast.cli import main; sys.exit(main())"  # as its script does


@pytest.mark.parametrize("words", [["-m", "hypermask_fast"], ["-m", "hypermask_fast.cli"], ["-c", RUN_COMMAND]])
def test_runs_as_a_module_and_as_the_installed_command(words):
    done = subprocess.run([sys.executable, *words, "train", "nothing"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("hypermask-fast: error: unknown preset 'nothing'")


def test_a_checkout_on_the_path_offers_no_package_kernels():
    """Another package has this name, and transformers imports what it finds."""
    words = "import kernels; assert not hasattr(kernels, 'masked_linear'); import hypermask_fast.kernels"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 or "No module named 'triton'" in done.stderr, done.stderr


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


TINY = "data.tasks=1 training.iterations=2 target.hidden=[2] hypernet.hidden=[2] hypernet.embedding=2"
TRAIN = ["train", "split-digits", *(word for setting in TINY.split() for word in ("--set", setting))]


def in_shell(words: list[str | bytes], redirection: str, folder: Path) -> subprocess.CompletedProcess:
    """The command with a shell's redirection after it; what else it writes is caught."""
    command = [sys.executable, "-m", "hypermask_fast", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirection}', "sh", *command], capture_output=True, cwd=folder, env=environment
    )


@pytest.mark.skipif(sys.platform != "linux", reason="a shell and its devices")
@pytest.mark.parametrize(
    ("words", "redirection", "code", "errors"),
    [
        (["presets"], ">&-", 0, b""),
        (["presets"], ">&- 2>&-", 0, b""),
        (["train", "nothing"], "2>&-", 2, b""),
        (["train"], "2>&-", 2, b""),
        (["train", "nothing"], "2>/dev/full", 2, b""),
        (["train", "nothing"], ">&-", 2, b"hypermask-fast: error: unknown preset 'nothing'"),
        (["presets"], ">/dev/full 2>/dev/full", 2, b""),
    ],
)
def test_closed_and_full_output(tmp_path, words, redirection, code, errors):
    done = in_shell(words, redirection, tmp_path)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.startswith(errors) and done.stderr.count(b"\n") == (1 if errors else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="a shell and its devices")
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>/dev/full", "2>&1 >&- | true"])
def test_a_run_ends_whether_or_not_its_progress_is_seen(tmp_path, redirection):
    done = in_shell([*TRAIN, "--out", "run"], redirection, tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="paths of any bytes")
def test_bytes_that_are_no_text(tmp_path):
    """In a setting they are refused, since config.toml could not hold them; a folder's name may be any."""
    for words in ([b"--set", b"title=a\xff"], [b"--data-dir", b"a\xff"]):
        done = in_shell([*TRAIN, *words, "--out", "run"], "", tmp_path)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert done.stderr.startswith(b"hypermask-fast: error: setting ") and b"must be text in UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = in_shell([*TRAIN, "--out", b"run\xff"], "", tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff/metrics.json")).exists()


_SLOW_TORCH = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"


@pytest.mark.parametrize("kind", ["-m hypermask_fast", "-m hypermask_fast.cli", "installed", "library"])
def test_control_c_while_it_is_imported(tmp_path, kind):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(_SLOW_TORCH)
    (tmp_path / "hypermask-fast").write_text(RUN_COMMAND)
    words = {"installed": [str(tmp_path / "hypermask-fast")], "library": ["-c", RUN_COMMAND]}.get(kind, kind.split())
    process = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "importing\n", process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, "130 in a shell"
    assert ("KeyboardInterrupt" in errors) if kind == "library" else errors == ""


def test_wide_tables_are_not_cut_in_a_pipe():
    done = subprocess.run(
        [sys.executable, "-m", "hypermask_fast", "presets"],
        env=os.environ | {"COLUMNS": "20", "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines() == [f"{name:<23}  {describe.title(config)}" for name, config in presets().items()]


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
    packages.add("sympy")  # which takes a sixth of all imports, and exporting alone needs
    assert not packages & set(done.stdout.split())
