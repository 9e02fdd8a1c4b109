"""Data and networks of the user's own on the command line: --scenario, --network, --images."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from hypermask_fast import InputError, cli
from hypermask_fast.training import run
from hypermask_fast.training.config import RunConfig
from hypermask_fast.training.exported import load_exported

MINE = """
import torch
from torch import nn

from hypermask_fast.data import Scenario, TaskData, TensorSplit

print("this file runs")


def tasks(seed, validation, tasks=None):
    def split(t, n):
        x = torch.randn(n, 6)
        return TensorSplit(x, (x[:, t] > 0).long())

    return Scenario("mine", tuple(TaskData("", split(t, 30), split(t, validation or 0), split(t, 20))
                                  for t in range(3)), (6,), 2)


def network(input_shape, num_classes):
    return nn.Sequential(nn.Linear(*input_shape, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, num_classes))
"""
TINY = ["--device", "cpu", "--set", "training.iterations=4", "--set", "hypernet.hidden=[4]"]


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@pytest.fixture
def refused(capsys):
    def run_refused(*words: object) -> str:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 2
        line = capsys.readouterr().err
        assert line.startswith("hypermask-fast: error: ") and line.count("\n") == 1, line
        return line

    return run_refused


OWN = ["--scenario", "mine.py:tasks", "--network", "mine.py:network"]


def train(out, *words) -> int:
    return cli.main(["train", "split-digits", "--out", str(out), *OWN, *TINY, *words])


@pytest.fixture
def trained(mine, tmp_path) -> Path:
    assert train("run", "--set", "data.validation=10") == 0
    return tmp_path / "run"


def test_a_run_of_one_s_own_code_from_its_beginning_to_its_export(trained, tmp_path, capsys, refused):
    stored = RunConfig.load(trained / "config.toml")
    assert stored.data.scenario == f"{tmp_path / 'mine.py'}:tasks" and stored.data.tasks == 3
    assert stored.target.name == f"{tmp_path / 'mine.py'}:network" and len(stored.target.fingerprint) == 16
    assert json.loads((trained / "metrics.json").read_text())["title"] == "mine.py:tasks, 3 tasks, mine.py:network"
    assert stored.target.hidden == (400, 400), "the preset's widths are of the preset's network"

    # Commands that read the folder run its code where it is named again, and not otherwise.
    for command in (["evaluate", "run"], ["inspect", "run"], ["export", "run", "--task", "1", "--to", "t.safetensors"]):
        capsys.readouterr()
        line = refused(*command)
        assert "the scenario and the network of the run in run are code, which runs only where you name it: " in line
        assert f"add --scenario {tmp_path / 'mine.py'}:tasks --network {tmp_path / 'mine.py'}:network" in line
        assert cli.main([*command, *OWN]) == 0
    shown = capsys.readouterr().out
    assert "net = load_exported('t.safetensors', net)" in shown
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    _, model, scenario = run.load_run("run", scenario="mine.py:tasks", network="mine.py:network")
    x = next(scenario.tasks[1].test.chunks(20))[0]
    with torch.no_grad():
        assert torch.equal(load_exported("t.safetensors", net)(x), model.export(1)(x))
    assert refused("evaluate", "run", "--network", "mine.py:network").count("--network") == 0, "what is missing alone"

    # It is finished, and the same command says so. A longer one is not what it has computed.
    assert train("run", "--resume") == 0 and "is finished" in capsys.readouterr().out
    assert "contradicts the run" in refused("train", "split-digits", *OWN, "--out", "run", "--resume", "--seed", "4")


def test_a_stopped_run_goes_on_with_the_same_numbers(trained, tmp_path):
    torch.rand(5)  # the function's data are of the run's seed, not of what was drawn before
    assert train("other", "--set", "data.validation=10", "--set", "training.checkpoint_every=2") == 0
    before = (tmp_path / "other" / "metrics.json").read_bytes()
    assert before == (trained / "metrics.json").read_bytes()
    (tmp_path / "moved").mkdir()
    shutil.move("mine.py", "moved")
    for name in [path.name for path in (tmp_path / "other").iterdir() if path.name != "config.toml"]:
        path = tmp_path / "other" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = ["--scenario", "moved/mine.py:tasks", "--network", "moved/mine.py:network", "--resume"]
    assert cli.main(["train", "split-digits", "--out", "other", *TINY[:2], *words]) == 0
    assert (tmp_path / "other" / "metrics.json").read_bytes() == before, "wherever the file lies"
    torch.rand(5)
    assert cli.main(["evaluate", "run", *words[:-1]]) == 0, "under the checkpoint's settings"


def test_a_changed_or_missing_file_is_said(trained, mine, capsys, refused):
    mine.write_text(MINE + "\n# more\n")
    capsys.readouterr()
    assert cli.main(["evaluate", "run", *OWN]) == 0
    told = capsys.readouterr().err
    assert told.startswith("hypermask-fast: warning: mine.py has changed since the run began: what follows is of wha")
    line = refused("train", "split-digits", "--out", "run", *OWN, *TINY, "--resume", "--set", "training.log_every=1")
    assert "mine.py has changed since the fingerprint in the run's configuration was taken" in line
    mine.unlink()
    assert f"scenario mine.py:tasks: there is no file {mine}" in refused("evaluate", "run", *OWN)
    assert cli.main(["compare", "run"]) == 0, "which needs no code"


def test_names_that_are_not_the_run_s(trained, mine, refused):
    line = refused("evaluate", "run", "--scenario", "mine.py:network", "--network", "mine.py:network")
    assert "--scenario mine.py:network is not the scenario of the run in run, mine.py:tasks" in line
    assert cli.main(["train", "split-digits", "--out", "plain", *TINY, "--set", "data.tasks=1"]) == 0
    assert "is not the network of the run in plain, mlp" in refused("evaluate", "plain", "--network", "mine.py:network")
    line = refused("train", "split-digits", "--out", "run", "--resume", *TINY)
    assert "holds a run of another preset, mine.py:tasks with mine.py:network, not split-digits with mlp" in line


def test_a_configuration_file_runs_the_code_that_it_names_and_says_so(trained, capsys):
    capsys.readouterr()
    assert cli.main(["train", "run/config.toml", "--device", "cpu", "--out", "again"]) == 0
    told = capsys.readouterr().err
    assert "the configuration says that the scenario is code, which runs now: /" in told
    assert "the network is code, which runs now: /" in told
    assert Path("run/metrics.json").read_bytes() == Path("again/metrics.json").read_bytes()


def test_an_export_names_no_code_that_would_run(trained, tmp_path):
    words = ["--task", "0", "--to", "t.safetensors", *OWN]
    assert cli.main(["export", "run", *words]) == 0
    with pytest.raises(InputError, match="is of a network of one's own"):
        load_exported("t.safetensors")
    with safe_open("t.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert "target" not in metadata and "mine.py" not in json.dumps(metadata)
    forged = {**metadata, "target": json.dumps({"name": f"{tmp_path}/evil.py:net", "hidden": [1], "width": 32})}
    (tmp_path / "evil.py").write_text("import pathlib; pathlib.Path('was-here').touch()")
    save_file(tensors, "forged.safetensors", forged)
    with pytest.raises(InputError, match="it names code"):
        load_exported("forged.safetensors")
    assert not Path("was-here").exists()


def test_a_module(mine, tmp_path, monkeypatch, refused):
    (tmp_path / "my_package_of_tasks").mkdir()
    shutil.move("mine.py", tmp_path / "my_package_of_tasks" / "made.py")
    words = ["--scenario", "my_package_of_tasks.made:tasks", "--network", "my_package_of_tasks.made:network"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["train", "split-digits", "--out", "run", *words, *TINY]) == 0
    assert cli.main(["evaluate", "run", *words]) == 0
    assert RunConfig.load(Path("run/config.toml")).data.scenario == "my_package_of_tasks.made:tasks"
    for name in [name for name in sys.modules if name.startswith("my_package_of_tasks")]:
        del sys.modules[name]


def test_a_file_finds_what_lies_beside_it_and_is_run_once(mine, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "beside_mine_in.py").write_text("import torch\nLAYER = torch.nn.Linear\n")
    (tmp_path / "in" / "net.py").write_text(
        "from beside_mine_in import LAYER\nfrom torch import nn\nprint('once')\n"
        "def net(num_classes, hidden):\n"
        "    return nn.Sequential(nn.Flatten(), LAYER(64, hidden[0]), LAYER(hidden[0], num_classes))\n"
    )
    words = ["--network", "in/net.py:net", "--set", "target.hidden=[7]", "--set", "data.tasks=1"]
    assert cli.main(["train", "split-digits", "--out", "run", *words, *TINY]) == 0
    assert capsys.readouterr().out.count("once") == 1
    _, model, _ = run.load_run("run", network="in/net.py:net")
    assert model.net[1].out_features == 7


# -- what is refused --------------------------------------------------------------------------------------------------


WRONG_SAMPLES = """
from hypermask_fast.data import DatasetSplit

def split(size=6, labels=(0, 1), number=0.0):
    x = torch.zeros(2, size)
    x[1] += number
    return TensorSplit(x, torch.tensor(labels))

def made(*splits, shape=(6,), classes=2):
    last = TaskData("", *splits)
    return Scenario("s", (last,) if splits[0].inputs.shape[1] != 6 else (TaskData("", split(), None, split()), last),
                    shape, classes)

def wide(): return made(split(7), None, split(7))
def one_wide(): return made(split(), None, split(7))
def no_number(): return Scenario("s", (TaskData("", split(), split(number=float("nan")), split()),), (6,), 2)
def untested(): return made(split(), None, split(labels=(0, 0)))
def untrained(): return Scenario("s", (TaskData("", split(labels=(1, 1)), None, split()),), (6,), 2)
def shapeless(): return made(split(), None, split(), shape="6")
def classless(): return made(split(), None, split(), classes=2.0)

class Files(torch.utils.data.Dataset):
    def __len__(self): return 2
    def __getitem__(self, i): raise FileNotFoundError("gone")

def later(label=1, size=6):
    items = DatasetSplit([(torch.zeros(6), 0), (torch.zeros(size), label)])
    return Scenario("s", (TaskData("", items, None, split()), TaskData("", split(), None, items)), (6,), 2)

def later_label(): return later(label=2)
def later_shape(): return later(size=7)
def arrays(): return made(TensorSplit(torch.zeros(2, 6).numpy(), torch.tensor([0, 1])))
def less_validated(): return Scenario("s", (TaskData("", split(), split(labels=(0, 0)), split()),) * 2, (6,), 2)
def unread(): return Scenario("s", (TaskData("", DatasetSplit(Files()), None, split()),), (6,), 2)
"""


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("split-digits", "--scenario takes path/to/file.py:function or module:function, not 'split-digits'"),
        ("mine.py", "--scenario takes path/to/file.py:function or module:function, not 'mine.py'"),
        ("mine.py:", "names no function"),
        (":tasks", "names no function"),
        ("not-there.py:f", "scenario not-there.py:f: there is no file "),
        ("mine.txt/x:f", "is no Python file (.py)"),
        ("no_such_module_here:f", "there is no module 'no_such_module_here', neither installed nor in "),
        ("json.no_such_part:f", "there is no module 'json.no_such_part'"),
        ("sys:exit", "module 'sys' has no file of its own"),
        ("mine.py:taks", "has no function 'taks' (did you mean 'tasks'?)"),
        ("mine.py:VALUE", "scenario mine.py:VALUE must be a function, it is of type int"),
        ("mine.py:nothing", "must return a hypermask_fast.data.Scenario, not NoneType"),
        ("mine.py:listed", "must return a hypermask_fast.data.Scenario, not list"),
        ("mine.py:raises", "scenario mine.py:raises raised KeyError: 'a' (mine.py, line "),
        ("mine.py:leaves", "scenario mine.py:leaves raised SystemExit: 3 (mine.py, line "),
        ("mine.py:wrong_data", "scenario mine.py:wrong_data: inputs must be (n, ...) uint8 or float32, not (2,) int64"),
        ("mine.py:asks", "asks for an argument 'path': what it may take is data_dir, seed, validation, tasks"),
        ("mine.py:Takes", "raised TypeError"),
        ("broken.py:f", "scenario broken.py:f raised SyntaxError: invalid syntax (broken.py, line 1)\n"),
        ("mine.py:wide", "mine.py:wide: task 0, training set: samples have shape (7,), not input_shape, (6,)"),
        ("mine.py:one_wide", "task 1, test set: samples have shape (7,), not input_shape, (6,)"),
        ("mine.py:no_number", "task 0, validation set: sample 1 is not finite"),
        ("mine.py:untested", "task 1, test set: class 1 has no samples"),
        ("mine.py:untrained", "task 0, training set: class 0 has no samples"),
        ("mine.py:unread", "scenario mine.py:unread raised FileNotFoundError: gone (mine.py, line "),
        ("mine.py:later_label", "labels must be 0 .. 1, found 2"),
        ("mine.py:later_shape", "inputs of a dataset must share shape and dtype"),
        ("mine.py:arrays", "mine.py:arrays: inputs must be (n, ...) uint8 or float32, not ndarray, which is no tensor"),
        ("mine.py:shapeless", "input_shape of s must list positive sizes, such as (1, 28, 28), not '6'"),
        ("mine.py:classless", "num_classes of s must be a whole number, 1 or more, not 2.0"),
        ("mine.py:pairs", "mine.py:pairs: the training data of task '' must be a split, "),
        ("imports.py:f", "raised ModuleNotFoundError: No module named 'not_installed_at_all' (imports.py, line 1)"),
    ],
)
def test_scenarios_that_are_none(mine, refused, scenario, message):
    mine.write_text(
        MINE + "VALUE = 3\ndef nothing(): pass\ndef listed(): return [1]\ndef raises(): return {}['a']\n"
        "def leaves(): raise SystemExit(3)\ndef wrong_data(): return TensorSplit(torch.zeros(2).long(), None)\n"
        "def pairs(): return Scenario('s', (TaskData('', (1, 2), None, (3, 4)),), (1,), 2)\n"
        + WRONG_SAMPLES
        + "def asks(path): pass\nclass Takes:\n    def __init__(self): raise TypeError\n"
    )
    Path("broken.py").write_text("def f(:\n")
    Path("imports.py").write_text("import not_installed_at_all\n")
    line = refused("train", "split-digits", "--out", "run", "--scenario", scenario, *TINY)
    assert message in line
    assert not Path("run").exists()


@pytest.mark.parametrize("scenario", ["later", "less_validated"])
def test_scenarios_that_are_some(mine, scenario):
    """Data that are read later; a validation set, which is only looked at, without samples of a class."""
    mine.write_text(MINE + WRONG_SAMPLES)
    assert cli.main(["train", "split-digits", "--out", "run", "--scenario", f"mine.py:{scenario}", *TINY]) == 0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("mlp", "--network takes path/to/file.py:function"),
        ("mine.py:nothing", "network mine.py:nothing must return a torch.nn.Module, not NoneType"),
        ("mine.py:tensor", "must return a torch.nn.Module, not a tensor of shape (3,)"),
        (
            "mine.py:narrow",
            "must give outputs of shape (2, 2) for inputs of shape (2, 1, 8, 8), not a tensor of shape (2",
        ),
        ("mine.py:pair", "must give outputs of shape (2, 2) for inputs of shape (2, 1, 8, 8), not tuple"),
        ("mine.py:misfits", "network mine.py:misfits raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("mine.py:masked", "must return the network that is to be masked, without the HyperMask around it"),
        ("mine.py:scripted", "is scripted or quantised: it reads a copy of its weight"),
        ("mine.py:asks", "asks for an argument 'depth': what it may take is input_shape, num_classes, hidden, width"),
    ],
)
def test_networks_that_are_none(mine, refused, network, message):
    mine.write_text(
        "import torch\nfrom torch import nn\ndef nothing(): pass\ndef tensor(): return torch.zeros(3)\n"
        "def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))\ndef misfits(): return nn.Linear(3, 2)\n"
        "class Pair(nn.Linear):\n    def forward(self, x): return x, x\ndef pair(): return Pair(2, 2)\n"
        "def asks(depth): pass\nfrom hypermask_fast import HyperMask\n"
        "import warnings\ndef scripted():\n    with warnings.catch_warnings():\n"
        "        warnings.simplefilter('ignore')\n"
        "        return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))\n"
        "def masked(): return HyperMask(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 5)\n"
    )
    assert message in refused("train", "split-digits", "--out", "run", "--network", network, *TINY)
    assert not Path("run").exists()


def test_settings_that_a_function_would_not_see(mine, refused):
    words = ["train", "split-digits", "--out", "run", *OWN, *TINY]
    line = refused(*words, "--data-dir", ".")
    assert "data_dir is set, and scenario mine.py:tasks takes no argument of that name" in line
    assert "hidden is set, and network mine.py:network takes" in refused(*words, "--set", "target.hidden=[3]")
    assert "mine.py:tasks has 3 tasks: data.tasks must be at most that, not 4" in refused(
        *words, "--set", "data.tasks=4"
    )
    assert "data.colour is for images" in refused(*words, "--set", "data.colour=grey")
    line = refused("train", "split-digits", "--out", "run", *TINY, "--set", "data.fingerprint=ab")
    assert "data.fingerprint is for images and for code of one's own" in line
    assert not Path("run").exists()


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    for part, count in (("train", 6), ("test", 3)):
        for c, name in enumerate("abcd"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng(10 * c + i).integers(0, 60, (8, 8, 3)) + 50 * c
                Image.fromarray(noise.astype(np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def test_images(images, tmp_path, monkeypatch, capsys, refused):
    monkeypatch.chdir(tmp_path)
    words = ["train", "split-digits", "--out", "run", "--images", "images", "--classes-per-task", "2", *TINY]
    words += ["--set", "data.normalise=first-task", "--set", "data.colour=grey", "--set", "data.image_size=[6, 6]"]
    assert cli.main(words) == 0
    stored = RunConfig.load(Path("run/config.toml")).data
    assert (stored.scenario, stored.dir, stored.tasks, stored.classes_per_task) == ("images", str(images), 2, 2)
    shown = capsys.readouterr().err
    assert "images, 2 tasks, MLP-100-100" in shown and "task 1 (c, d) of 0 to 1" in shown
    assert cli.main(["evaluate", "run"]) == 0 and "task 1 (c, d)" in capsys.readouterr().out
    assert cli.main(["export", "run", "--task", "1", "--to", "t.safetensors"]) == 0
    exported = load_exported("t.safetensors").exported
    assert exported.class_names == ("c", "d") and exported.input_shape == (1, 6, 6) and len(exported.prepare.mean) == 1
    assert cli.main([*words, "--resume"]) == 0, "finished"
    changed = words.index("2")
    line = refused(*words[:changed], "4", *words[changed + 1 :], "--resume")
    assert "data.classes_per_task=4 contradicts the run in run" in line

    shutil.move("images", "elsewhere")
    assert "elsewhere" not in refused("evaluate", "run")
    assert cli.main(["evaluate", "run", "--data-dir", "elsewhere"]) == 0
    (tmp_path / "elsewhere" / "test" / "a" / "0.png").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", "run", "--data-dir", "elsewhere"]) == 0
    assert "warning: what is in " in capsys.readouterr().err


def test_flags_of_images_that_do_not_go_together(images, mine, refused):
    words = ["train", "split-digits", "--out", "run", *TINY]
    assert "--scenario and --images both say" in refused(*words, "--images", images, "--scenario", "mine.py:tasks")
    assert "--images and --data-dir both say" in refused(*words, "--images", images, "--data-dir", images)
    assert "--classes-per-task is for --images" in refused(*words, "--classes-per-task", "2")
    assert "4 classes: say how many a task has (--classes-per-task)" in refused(*words, "--images", images)
    assert "2 or more, not 1" in refused(*words, "--images", images, "--classes-per-task", "1")
    assert "images need their folder" in refused(*words, "--set", "data.scenario=images")
    shutil.rmtree(images / "test" / "b")
    line = refused(*words, "--images", images, "--classes-per-task", "2")
    assert "class 'b' is in" in line and "and not in" in line
    assert not Path("run").exists()
