"""HyperMask as a model of Mammoth, with a stand-in for Mammoth, which is on no package registry."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hypermask_fast as hmf

ROOT = Path(__file__).parents[2]
SCRIPT, STAND_IN = ROOT / "examples/mammoth/hypermask.py", ROOT / "tests/support/mammoth_stand_in"
SETTINGS = {"lr": 0.01, "n_epochs": 10, "batch_size": 16, "embedding": 8, "hidden": [10]}


def loaded(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mammoth(monkeypatch):
    """The stand-in as `mammoth`, with the model registered."""
    monkeypatch.setitem(sys.modules, "mammoth", None)
    module = loaded("mammoth", STAND_IN / "mammoth/__init__.py")
    monkeypatch.setitem(sys.modules, "mammoth_example", None)
    loaded("mammoth_example", SCRIPT)
    return module


@pytest.mark.parametrize(("setting", "per_task"), [("class-il", 2), ("task-il", [1, 2, 3]), ("domain-il", 6)])
def test_it_learns_and_forgets_nothing(mammoth, setting, per_task):
    model, dataset = mammoth.load_runner("hypermask", mammoth.Dataset(setting, per_task), SETTINGS)
    rows = mammoth.train(model, dataset)
    assert all(rows[task][task] > 0.85 for task in range(3))
    assert all(rows[-1][task] > rows[task][task] - 0.1 for task in range(3))
    assert isinstance(model.opt, hmf.optim.Adam) and model.net.num_tasks == 3


def test_a_task_has_outputs_for_its_own_classes_only(mammoth):
    model, dataset = mammoth.load_runner("hypermask", mammoth.Dataset("task-il", [1, 2, 3]), SETTINGS)
    model.net.eval()
    x, _ = dataset.data(1, seed=1)
    outputs = model(x, 1)
    assert outputs.isfinite().any(0).tolist() == [False, True, True, False, False, False]
    torch.testing.assert_close(outputs[:, 1:3], model.net(x, task=1)[:, 1:3])


def test_where_no_task_is_told_it_is_found_among_those_that_have_begun(mammoth):
    model, dataset = mammoth.load_runner("hypermask", mammoth.Dataset(), SETTINGS)
    model.net.eval()
    x = torch.cat([dataset.data(task, seed=1)[0] for task in range(3)])
    assert model(x).isfinite().any(0).tolist() == [True, True, False, False, False, False]
    model.meta_begin_task(dataset)
    model.meta_end_task(dataset)
    assert model.current_task == 1 and model(x).isfinite().any(0).tolist() == [True, True, False, False, False, False]
    model._current_task = 0
    mammoth.train(model, dataset)
    saved, (model, _) = mammoth.CHECKPOINTS[-1], mammoth.load_runner("hypermask", mammoth.Dataset(), SETTINGS)
    mammoth.load_checkpoint(model, saved)
    model.net.eval()
    found = model.net.infer_task(x)
    torch.testing.assert_close(model(x).isfinite().nonzero()[::2, 1], 2 * found)


def test_a_checkpoint_fits_a_new_model(mammoth):
    model, dataset = mammoth.load_runner("hypermask", mammoth.Dataset(), SETTINGS)
    mammoth.train(model, dataset)
    for saved in mammoth.CHECKPOINTS:
        again, _ = mammoth.load_runner("hypermask", mammoth.Dataset(), SETTINGS)
        mammoth.load_checkpoint(again, saved)
    assert mammoth.evaluate(again, dataset, 3) == mammoth.evaluate(model, dataset, 3)


def test_the_numbers_are_those_of_a_loop_by_hand(mammoth):
    settings = SETTINGS | {"n_epochs": 2}
    model, dataset = mammoth.load_runner("hypermask", mammoth.Dataset(), settings)
    by_hand, _ = mammoth.load_runner("hypermask", mammoth.Dataset(), settings)
    mammoth.train(model, dataset)
    net, by_hand.opt = by_hand.net, None
    for task in range(3):
        net.begin_task(task)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        x, y = dataset.data(task, seed=0)
        for rows in [*torch.arange(len(x)).split(16)] * 2:
            mask = net.mask(task)
            outputs = net(x[rows], mask)[:, 2 * task : 2 * task + 2]
            loss = torch.nn.functional.cross_entropy(outputs, y[rows] - 2 * task) + net.regularizer(mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, expected in net.named_parameters():
        assert (dict(model.net.named_parameters())[name] - expected).norm() <= 5e-5 * expected.norm(), name


def test_the_script_trains():
    """As a command, in a process of its own; options of the model come after those of every model."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{STAND_IN}", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(SCRIPT), "--lr", "0.01", "--n_epochs", "5", "--batch_size", "16", "--hidden", "10"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["task 0", "task 1", "task 2"]
