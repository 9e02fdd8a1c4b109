"""Lightning, accelerate and Hugging Face's Trainer, as the examples use them: the numbers of a loop written by hand."""

import os
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.framework import TASKS, model_and_data
from torch.utils.data import DistributedSampler

ROOT = Path(__file__).parents[2]
CLIP, BATCH = 0.05, 16  # of the examples


def by_hand(accumulate, dealt_to=None):
    """Losses of each task and parameters: gradients of so many batches averaged, then clipped.

    dealt_to: samples are drawn for so many ranks, as Lightning has torch's DistributedSampler do it.
    """
    model, x, y = model_and_data()
    losses = []
    if dealt_to:
        drawn = [list(DistributedSampler(x[0], dealt_to, rank)) for rank in range(dealt_to)]
        order = torch.tensor(drawn).view(dealt_to, -1, BATCH).transpose(0, 1).flatten()
        x, y = x[:, order], y[:, order]
    for task in range(TASKS):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        model.begin_task(task)
        losses.append([])
        for i, (a, b) in enumerate(zip(x[task].split(BATCH), y[task].split(BATCH), strict=True)):
            mask = model.mask(task)
            loss = F.cross_entropy(model(a, mask), b) + model.regularizer(mask)
            (loss / accumulate).backward()
            losses[-1].append(loss.item())
            if (i + 1) % accumulate == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def run(folder, launcher, script, *arguments):
    """Python's output. The package is linked where nothing else of the repository is: `kernels` is a package, too."""
    (folder / "path").mkdir()
    (folder / "path/hypermask_fast").symlink_to(ROOT / "hypermask_fast")
    environment = os.environ | {"PYTHONPATH": str(folder / "path"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(script), *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
CASES = {
    "Lightning": ("with_lightning", ["lightning"], (), ()),
    "Lightning by hand": ("with_lightning", ["lightning"], (), ("manual",)),
    "Lightning in two processes": ("with_lightning", ["lightning"], TORCHRUN, ()),
    "Lightning by hand in two processes": ("with_lightning", ["lightning"], TORCHRUN, ("manual",)),
    "Lightning, sharded": ("with_lightning", ["lightning"], TORCHRUN, ("sharded",)),
    "accelerate, sharded": ("with_accelerate", ["accelerate"], TORCHRUN, ("sharded",)),
    "accelerate": ("with_accelerate", ["accelerate"], (), ()),
    "accelerate in two processes": ("with_accelerate", ["accelerate"], TORCHRUN, ()),
    "transformers": ("with_transformers", ["transformers", "accelerate"], (), ()),
}


def skip_without(packages):
    for package in packages:
        if util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_a_loop_by_hand(name, tmp_path):
    example, packages, launcher, arguments = CASES[name]
    skip_without(packages)
    script = tmp_path / "framework.py"  # a copy: what lies beside it is no package
    shutil.copy(ROOT / "tests/support/framework.py", script)
    run(tmp_path, launcher, script, str(ROOT / f"examples/{example}.py"), str(tmp_path / "found"), *arguments)
    ranks = [torch.load(file) for file in sorted(tmp_path.glob("found.*.pt"))]
    assert len(ranks) == (2 if launcher else 1)
    losses, parameters = by_hand(2 * len(ranks), len(ranks) if launcher and example == "with_lightning" else None)
    for rank, (found, own) in enumerate(ranks):
        for task in range(TASKS):
            mine = torch.tensor(losses[task][rank :: len(ranks)])
            torch.testing.assert_close(torch.tensor(found[task]), mine, rtol=1e-4, atol=1e-5)
        for key, value in parameters.items():
            assert (own[key] - value).norm() <= 5e-5 * value.norm(), key
            assert torch.equal(own[key], ranks[0][1][key])


@pytest.mark.parametrize(("name", "packages"), {case[0]: case[1] for case in CASES.values()}.items())
def test_the_loss_falls(name, packages, tmp_path):
    skip_without(packages)
    text = run(tmp_path, (), ROOT / f"examples/{name}.py")
    lines = [line for line in text.splitlines() if line.startswith("task ")]
    assert len(lines) == 2
    for line in lines:
        first, last = (float(part.split()[0]) for part in line.split("loss ")[1].split(", "))
        assert last < 0.7 * first
