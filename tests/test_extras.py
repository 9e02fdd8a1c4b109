"""What each extra's packages are needed for, and what is said where one is missing."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

import hypermask_fast as hmf
from hypermask_fast import InputError, analysis, cli, env
from hypermask_fast.data.sources.images import decode_jpegs
from hypermask_fast.extras import needed_for
from hypermask_fast.text import text_table
from hypermask_fast.training import report, run, study
from hypermask_fast.training.config import load_preset
from hypermask_fast.training.logs import TerminalLog

ROOT = Path(__file__).parents[1]
TRAIN = ("sklearn", "matplotlib", "PIL", "rich", "scipy", "tomli_w", "tensorboard", "tqdm")


@pytest.fixture
def hide(monkeypatch):
    """Makes a package look as if it were not installed."""

    def hide_package(package: str) -> None:
        loaded = [name for name in sys.modules if name.startswith(f"{package}.")]
        for name in (package, *loaded):
            monkeypatch.setitem(sys.modules, name, None)

    return hide_package


def needs(what: str, package: str) -> str:
    return f'{what} needs {package}: pip install "hypermask-fast[train]"'


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("package", "use", "message"),
    [
        ("sklearn", lambda _: hmf.data.load_scenario("split-digits"), needs("the digits data set", "scikit-learn")),
        ("PIL", lambda _: decode_jpegs([b""], 8, "here"), needs("reading JPEG images", "pillow")),
        ("matplotlib", lambda _: report.figure_class(), needs("drawing pictures", "matplotlib")),
        ("matplotlib", lambda d: run.train(load_preset("split-digits"), d), needs("drawing pictures", "matplotlib")),
        ("tomli_w", lambda d: run.train(load_preset("split-digits"), d), needs("writing a configuration", "tomli-w")),
        ("matplotlib", lambda d: analysis.pictures.check_free(d), needs("drawing pictures", "matplotlib")),
        ("scipy", lambda _: study.estimate([1.0, 2.0]), needs("confidence intervals", "scipy")),
        ("rich", lambda _: text_table([("a",)], "<"), needs("a text table", "rich")),
        ("rich", lambda _: TerminalLog(1, stream=Terminal()), needs("the progress bar", "rich")),
    ],
)
def test_a_missing_package_is_named_with_its_extra_before_anything_is_done(tmp_path, hide, package, use, message):
    hide(package)
    with pytest.raises(InputError) as caught:
        use(tmp_path / "run")
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "words", "message"),
    [
        ("rich", ["presets"], needs("the command line", "rich")),
        ("rich", ["evaluate", "anywhere"], needs("the command line", "rich")),
        ("rich", ["train", "split-digits"], needs("the command line", "rich")),
        ("sklearn", ["train", "split-digits"], needs("the digits data set", "scikit-learn")),
        ("matplotlib", ["train", "split-digits"], needs("drawing pictures", "matplotlib")),
        ("tomli_w", ["presets", "split-digits"], needs("writing a configuration", "tomli-w")),
    ],
)
def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys, hide, package, words, message):
    hide(package)
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert capsys.readouterr() == ("", f"hypermask-fast: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_env_tells_what_is_missing_without_needing_it(capsys, monkeypatch, hide):
    for package in TRAIN:
        hide(package)
    real = env.metadata.version

    def version(package: str) -> str:
        if package == "rich":
            raise env.metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(env.metadata, "version", version)
    assert cli.main(["env"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("rich:")]
    assert line.split(maxsplit=1)[1] == 'not installed (pip install "hypermask-fast[train]")'


def test_a_package_that_fails_for_another_reason_keeps_its_error():
    with pytest.raises(ImportError, match="cannot import name"), needed_for("nothing"):
        from json import nothing  # noqa: F401


_LIBRARY_ALONE = f"""
import sys
for name in {TRAIN!r}:
    sys.modules[name] = None
import torch
from torch import nn
import hypermask_fast as hmf
from hypermask_fast.training import config, run, trainer

assert "split-digits" in config.presets()
samples, labels = torch.randn(8, 4), torch.arange(8) % 2
split = hmf.data.TensorSplit(samples, labels)
scenario = hmf.data.Scenario("mine", (hmf.data.TaskData("0", split, split, split),), (4,), 2)
model = hmf.HyperMask(nn.Linear(4, 2), 1)
result = trainer.Trainer(model, scenario, config.TrainingConfig(iterations=2, batch_size=4)).fit()
assert result.steps == 2
"""


def test_the_library_trains_with_torch_numpy_and_safetensors_alone():
    done = subprocess.run([sys.executable, "-c", _LIBRARY_ALONE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
