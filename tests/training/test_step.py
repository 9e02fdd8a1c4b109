"""Training steps as CUDA graphs: when they are given up, and what for. Without a GPU a stand-in for torch.cuda."""

import contextlib
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.training.step import TaskWork, steps


class FakeCuda:
    """What `training.step` uses of torch.cuda, on the CPU. A capture runs nothing and raises `fails`."""

    def __init__(self, monkeypatch, fails):
        self.watching, self.captures, self.fails = False, 0, fails
        self.random_state = "the user's"
        self.stream = stream = SimpleNamespace(wait_stream=lambda other: None)
        generator = SimpleNamespace(
            clone_state=lambda: self.random_state,
            graphsafe_set_state=lambda state: setattr(self, "random_state", state),
        )
        fakes = {
            "Stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "current_device": lambda: 0,
            "default_generators": (generator,),
            "get_sync_debug_mode": lambda: 0,
            "set_sync_debug_mode": lambda mode: setattr(self, "watching", mode == "warn"),
            "CUDAGraph": object,
            "graph": self.capture,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def capture(self, graph):
        self.captures += 1
        self.stream, self.random_state = None, "the capture's"
        raise RuntimeError(self.fails)


class Waiting(nn.Module):
    """Looks at a value: on a GPU the host waits for the device, and PyTorch warns of it where it is asked to."""

    cuda: FakeCuda

    def forward(self, x):
        if self.cuda.watching:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)
        return x


class RandomItems(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, i):
        return torch.randn(8), i % 2


def work(*layers):
    """Six steps of ten samples, and the model they train."""
    torch.manual_seed(0)
    model = hmf.HyperMask(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), *layers, nn.Linear(6, 2)), 1, 20)
    samples = torch.utils.data.TensorDataset(torch.randn(50, 8), torch.arange(50) % 2)
    split = hmf.data.from_datasets([(samples, samples, samples)]).tasks[0].train
    rows = torch.randint(50, (6, 10))
    return TaskWork(model, 0, split, rows, model.layout.ramp_ranks([20]), hmf.optim.Adam(model), "float32")


def assert_trained_the_same(graphed, eager):
    for found, expected in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_capture_that_fails_leaves_all_as_it_was(monkeypatch):
    cuda, said, ours = FakeCuda(monkeypatch, "operation not permitted\nCUDA kernel errors might"), [], work()
    losses = [values["loss"].item() for values in steps(ours, True, said.append)]
    assert said == ["training without a CUDA graph: the step can't be captured: operation not permitted"]
    assert cuda.stream is torch.cuda.Stream() and cuda.random_state == "the user's"
    eager = work()
    assert losses == [values["loss"].item() for values in steps(eager, False, said.append)]
    assert_trained_the_same(ours, eager)


def test_a_step_that_waits_for_the_device_is_not_captured(monkeypatch):
    waiting = Waiting()
    waiting.cuda, said, ours = FakeCuda(monkeypatch, "never tried"), [], work(waiting)
    assert len(list(steps(ours, True, said.append))) == 6
    (reason,) = said
    assert reason.startswith("training without a CUDA graph: the step waits for the GPU: ") and ", line " in reason
    assert waiting.cuda.captures == 0 and not waiting.cuda.watching
    eager = work(waiting)
    list(steps(eager, False, said.append))
    assert_trained_the_same(ours, eager)


@pytest.mark.parametrize("block", [1, 2, 4, 5])
def test_blocks_are_the_same_steps(monkeypatch, block):
    """Blocks take each other's place in what a captured step reads, before, within and after the warm-up."""
    FakeCuda(monkeypatch, "not on a CPU")
    eager = work()
    ramp = eager.model.layout.ramp_ranks([0, 10, 20, 30, 60, 90])
    losses = [values["loss"].item() for values in steps(replace(eager, ranks=ramp), False, print)]
    for graph in (False, True):
        ours = work()
        blocks = iter([(ours.rows[i : i + block].clone(), ramp[i : i + block].clone()) for i in range(0, 6, block)])
        rows, ranks = next(blocks)
        first = replace(ours, rows=rows, ranks=ranks)
        assert [values["loss"].item() for values in steps(first, graph, print, blocks)] == losses
        assert_trained_the_same(ours, eager)


def test_batches_of_a_dataset_are_not_captured():
    dataset, ours, said = torch.utils.data.TensorDataset(torch.randn(50, 8), torch.arange(50) % 2), work(), []
    split = hmf.data.from_datasets([(dataset, dataset, dataset)], in_memory=False).tasks[0].train
    task = TaskWork(ours.model, 0, split, ours.rows, ours.ranks, ours.optimizer, "float32")
    assert len(list(steps(task, True, said.append))) == 6
    assert said == ["training without a CUDA graph: batches come from a Dataset, read on the host"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dataset_is_read_by_one_call_for_all_blocks(num_workers):
    """Its workers draw one seed per call: more calls would be other numbers."""
    ours, losses = work(), []
    for block in (6, 2):
        ours, dataset = work(), RandomItems()
        split = hmf.data.from_datasets([(dataset,) * 3], in_memory=False, num_workers=num_workers).tasks[0].train
        blocks = iter([(rows, ours.ranks) for rows in ours.rows.split(block)])
        rows, ranks = next(blocks)
        torch.manual_seed(1)
        losses.append(
            [
                values["loss"].item()
                for values in steps(replace(ours, split=split, rows=rows, ranks=ranks), False, print, blocks)
            ]
        )
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_network_that_reads_a_value_trains_on():
    class Reading(nn.Module):
        def forward(self, x):
            return x if x.sum().item() < 1e30 else -x

    ours, said = work(Reading(), nn.Dropout(0.1)), []
    ours.model.cuda()
    on_gpu = TaskWork(
        ours.model,
        0,
        ours.split.to("cuda"),
        ours.rows.cuda(),
        ours.ranks.cuda(),
        hmf.optim.Adam(ours.model, torch.tensor(1e-3, device="cuda"), capturable=True),
        "float32",
    )
    assert len(list(steps(on_gpu, True, said.append))) == 6
    assert "the step waits for the GPU" in said[0]
