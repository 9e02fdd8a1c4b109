"""Loops that K processes run, and one process with the whole batch: here, where a process can import them."""

import contextlib
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hypermask_fast as hmf

from . import launching

TASKS, STEPS, BATCH = 2, 3, 32
OPTIMISERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), 1e-2),
    "default": lambda model: hmf.optim.Adam(model, 1e-2),
    "step_in_backward": lambda model: hmf.optim.Adam(model, 1e-2, step_in_backward=True),
}


class Net(nn.Module):
    """Masked layers, a layer norm of each task's own, an embedding that is not masked, a shared parameter."""

    def __init__(self, sparse=False):
        super().__init__()
        self.table = nn.Embedding(6, 8, sparse=sparse)
        self.first, self.norm, self.head = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 3)
        self.shift = nn.Parameter(torch.zeros(12))

    def forward(self, x):
        x = x + self.table((10 * x[:, 0].abs()).long() % 6)
        return self.head(self.norm(self.first(x) + self.shift).tanh())


def mlp(seed=1, chunk_size=None, tasks=TASKS, dtype=torch.float64, per_task="norm", **settings):
    torch.manual_seed(seed)
    net = Net(**settings)
    config = hmf.HypernetConfig(embedding=6, hidden=(10,), chunk_size=chunk_size)
    drifts = {"beta": 0.5, "lam": 0.02, "drift_norm": 2}
    return hmf.HyperMask(net, tasks, 20, config, exclude="table.*", per_task=per_task, **drifts).to(dtype)


def data(task, step, shape=(8,), dtype=torch.float64, classes=3):
    generator = torch.Generator().manual_seed(100 * task + step)
    x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (BATCH,), generator=generator)


def rank_and_count(alone):
    return (0, 1) if alone else (dist.get_rank(), dist.get_world_size())


def clipped(model):
    hmf.optim.clip_grad_norm_(model, 0.05)


def train(model, optimiser, loop="plain", call=None, alone=False, batch=data, tasks=TASKS, loss=F.cross_entropy):
    """Each rank's loop over its shares; alone: one process's, over whole batches.

    Returns:
        The mean of the ranks' losses in each step, and all parameters and buffers.
    """
    here, losses = rank_and_count(alone), []
    call = model if call is None else call
    for task in range(tasks):
        optimizer = OPTIMISERS[optimiser](model)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = batch(task, step)
            parts = 2 if loop == "accumulate" else 1
            total = 0.0
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                rows, weight = hmf.distributed.share(len(a), *here)
                mask = model.mask(task)
                value = weight * loss(call(a[rows], mask), b[rows]) + model.regularizer(mask)
                if loop == "mixed":
                    of_row = torch.arange(len(a)) % (task + 1)
                    value = value + weight * loss(call(a[rows], of_row[rows]), b[rows])
                value.backward()
                total += value.detach() - model.regularizer(task).detach()
            if loop == "clip":
                clipped(model)
            optimizer.step()
            losses.append(total)
    return {**state(model), "losses": averaged(torch.stack(losses), alone)}


def state(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def averaged(tensor, alone):
    if not alone:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


@contextlib.contextmanager
def counted():
    """Numbers of all-reduces and of what they carry, while the block runs."""
    sent, before = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return before(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sent
    finally:
        dist.all_reduce = before


def in_processes(work, count, *arguments):
    """What `work(*arguments)` returns on each of so many gloo ranks."""
    ended = launching.ranks(count, _in_group, work, arguments, seconds=600)
    assert not any(rank.code for rank in ended), "\n".join(rank.err for rank in ended)
    return [rank.result for rank in ended]


def _in_group(rank, work, arguments):
    warnings.simplefilter("ignore", FutureWarning)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    found = work(*arguments)
    dist.destroy_process_group()
    return found
