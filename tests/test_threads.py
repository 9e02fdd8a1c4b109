"""The same bits from any number of threads: in processes of their own, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.networks import blob_model, blob_scenario

from hypermask_fast.hypernet import HypernetConfig
from hypermask_fast.training.config import TrainingConfig
from hypermask_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[1]

_DIGESTS = """
import hashlib, itertools, json, sys
import torch
from hypermask_fast.hypernet import HypernetConfig

widths = (24, 25, 100, 128)
shapes = [(e, (h,), None) for e, h in itertools.product(widths, widths)] + [(24, (50, 50), None), (24, (100,), 9)]

def digests():
    found = {}
    for embedding, hidden, chunk_size in shapes:
        torch.manual_seed(embedding)
        net = HypernetConfig(embedding, hidden, chunk_size).build(9, 40)
        for tasks in (2, 5, 7, 10, 12, 40):
            net.zero_grad()
            rows = net.hidden(range(tasks))
            rows.backward(torch.randn_like(rows))
            for name, value in [("rows", rows), *((name, p.grad) for name, p in net.named_parameters())]:
                if value is not None:
                    key = f"{embedding}-{hidden}-{chunk_size}, {tasks} tasks, {name}"
                    found[key] = hashlib.md5(value.detach().numpy().tobytes()).hexdigest()
    return found

by_threads = []
for threads in map(int, sys.argv[1:]):
    torch.set_num_threads(threads)
    assert torch.get_num_threads() == threads
    by_threads.append(digests())
print(json.dumps(by_threads))
"""


def output_of(*words: object, threads: int) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, words)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


def test_the_trunk_and_all_its_gradients():
    expected, *others = json.loads(output_of("-c", _DIGESTS, 1, 2, 4, threads=4))
    assert len(expected) > 500 and len(others) == 2
    for found in others:
        assert [key for key in expected if found[key] != expected[key]] == []


def test_the_trunk_s_gradients_are_right_twice():
    net = HypernetConfig(4, (5, 3)).build(7, 6).double()
    names, values = zip(*net.named_parameters(), strict=True)

    def logits(*parameters):
        return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (range(6),))

    torch.autograd.gradcheck(logits, values)
    torch.autograd.gradgradcheck(logits, values)


def test_a_run_of_five_tasks(tmp_path):
    """From the fifth task on the trunk's products have the rows in which PyTorch's own depend on threads."""
    folders = [tmp_path / str(threads) for threads in (1, 2)]
    settings = ["training.iterations=6", "training.log_every=1", "training.checkpoint_every=0"]
    words = ["-m", "hypermask_fast", "train", "split-digits", "--device", "cpu"]
    words += [word for setting in settings for word in ("--set", setting)]
    for threads, folder in enumerate(folders, start=1):
        output_of(*words, "--out", folder, threads=threads)
    for name in ("log.csv", "metrics.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_going_on_with_another_number_of_threads_is_told(tmp_path, recwarn):
    def trainer():
        return Trainer(blob_model(1), blob_scenario(1), TrainingConfig(iterations=1), run_dir=tmp_path)

    trainer().fit()
    trainer().fit(resume=True)
    assert not recwarn.list
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        told = rf"^the run was saved on {before} threads? and goes on with {before + 1}: "
        with pytest.warns(UserWarning, match=told):
            trainer().fit(resume=True)
    finally:
        torch.set_num_threads(before)
