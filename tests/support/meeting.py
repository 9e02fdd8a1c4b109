"""What each process does in tests/distributed/test_meeting.py: the ranks of a pair make different calls of a model."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import hypermask_fast as hmf
from support.loops import data, mlp
from support.told import refusal


def sharded(**settings):
    return hmf.distributed.shard(mlp(tasks=4, **settings))


def replicated():
    return hmf.distributed.replicate(mlp(tasks=4))


def backward(model, task):
    x, y = data(task, 0)
    mask = model.mask(task)
    (F.cross_entropy(model(x, mask), y) + model.regularizer(mask)).backward()


def with_optimiser(model):
    model.optimiser = hmf.optim.Adam(model)  # whose mask begins a task by itself
    return model


@torch.no_grad()
def output(model, tasks):
    return model(data(0, 0)[0], tasks)


# Name -> a model, and what ranks 0 and 1 do with it.
PAIRS = {
    "masks, one of which begins a task": (lambda: with_optimiser(sharded()), lambda m: m.mask(0), lambda m: m.mask(1)),
    "beginning of a task and mask": (sharded, lambda m: m.begin_task(2), lambda m: m.mask(0)),
    "beginnings of two tasks": (sharded, lambda m: m.begin_task(1), lambda m: m.begin_task(3)),
    "outputs of two tasks": (sharded, lambda m: output(m, 0), lambda m: output(m, 3)),
    "outputs of one task and of two": (sharded, lambda m: output(m, 0), lambda m: output(m, torch.arange(32) % 2)),
    "outputs, chunked": (lambda: sharded(chunk_size=30), lambda m: output(m, 1), lambda m: output(m, 2)),
    "backward pass and mask": (sharded, lambda m: backward(m, 0), lambda m: (m.mask(0), m.mask(0))),
    "backward passes, sharded": (sharded, lambda m: backward(m, 0), lambda m: backward(m, 2)),
    "backward passes, replicated": (replicated, lambda m: backward(m, 0), lambda m: backward(m, 2)),
}  # fmt: skip


def pairs():
    """What each pair is told, and whether the ranks' output is the same when they make the same call afterwards."""
    found = {}
    for name, (make, *calls) in PAIRS.items():
        model = make()
        said = refusal(lambda: calls[dist.get_rank()](model))  # noqa: B023
        found[name] = said, output(model, 1)
    return found
