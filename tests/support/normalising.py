"""What each process does in tests/distributed/test_batch_norm.py."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from support.loops import BATCH, TASKS, averaged, data, train
from support.told import refusal

FIDELITIES = ("default", "official")
DTYPES = (torch.float64, torch.float32)
OTHERS = ("GroupNorm", "InstanceNorm2d", "LayerNorm")
images = partial(data, shape=(2, 6, 6))


class Activated(nn.BatchNorm2d):
    """As timm's: batch norm and activation in one."""

    def forward(self, input):
        return super().forward(input).relu()


class Own(nn.BatchNorm2d):
    """One that computes its statistics itself."""

    def forward(self, input):
        return (input - input.mean((0, 2, 3), keepdim=True)) / input.std((0, 2, 3), keepdim=True)


NORMS = {
    "BatchNorm2d": nn.BatchNorm2d,
    "SyncBatchNorm": nn.SyncBatchNorm,
    "untracked": partial(nn.BatchNorm2d, track_running_stats=False, affine=False),
    "cumulative": partial(nn.BatchNorm2d, momentum=None),
    "activated": Activated,
    "own": Own,
    "GroupNorm": partial(nn.GroupNorm, 2),
    "InstanceNorm2d": partial(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    "LayerNorm": lambda channels: nn.LayerNorm((channels, 6, 6)),
}


class Block(nn.Module):
    """Its convolution has no bias, whose gradient would be 0 but for rounding: Adam makes full steps of that."""

    def __init__(self, norm, channels=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels)

    def forward(self, x):
        return x + self.norm(self.conv(x)).relu()


def convnet(kind="BatchNorm2d", fidelity="default", seed=1, tasks=TASKS, dtype=torch.float64, per_task=None):
    torch.manual_seed(seed)
    norm = NORMS[kind]
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(), Block(norm),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    config = hmf.HypernetConfig(embedding=6, hidden=(10,))
    model = hmf.HyperMask(net, tasks, 20, config, fidelity=fidelity, beta=0.1, drift_norm=2, per_task=per_task)
    return model.to(dtype)


def synchronised(*arguments, evaluation=False, how="replicate", **settings):
    """Each rank begins elsewhere."""
    model = getattr(hmf.distributed, how)(convnet(*arguments, seed=1 + dist.get_rank(), **settings))
    return hmf.distributed.synchronise_batch_norm(model, evaluation)


def trained(model, optimiser="default", loop="plain", alone=False, dtype=torch.float64):
    return train(model, optimiser, loop, alone=alone, batch=partial(images, dtype=dtype))


def work():
    found = {}
    for fidelity in FIDELITIES:
        for dtype in DTYPES:
            found[fidelity, dtype] = trained(synchronised(fidelity=fidelity, dtype=dtype), dtype=dtype)
    for kind in ("SyncBatchNorm", "untracked", "cumulative", "activated"):
        found[kind] = trained(synchronised(kind))
    found["shard"] = trained(synchronised(how="shard"))
    found["mixed"] = trained(synchronised(), loop="mixed")
    found["own norms"] = trained(synchronised(per_task="norm"))
    for kind in OTHERS:
        found[kind] = trained(hmf.distributed.replicate(convnet(kind)))
    for name in CASES:
        found[name] = CASES[name]()
    return found


def in_evaluation():
    """Outputs of the rank's share in the official fidelity, of a batch that leaves the last rank without a sample."""
    model = synchronised(fidelity="official", evaluation=True).eval()
    x, _ = images(0, 0)
    few = x[: dist.get_world_size() - 1]
    rows, _ = hmf.distributed.share(len(few), least=0)
    with torch.no_grad():
        return model(few[rows], 0), rows.start, rows.stop


def without_evaluation():
    """One rank alone evaluates, which must not wait for the others."""
    model = synchronised(fidelity="official").eval()
    x, _ = images(0, 0)
    return model(x, 0) if dist.get_rank() == 0 else None


def one_sample_each():
    model = synchronised()
    x, y = images(0, 0)
    rows, weight = hmf.distributed.share(dist.get_world_size())
    (weight * F.cross_entropy(model(x[rows], 0), y[rows])).backward()
    return model.net[1].weight.grad.clone()


def checkpointed():
    """A block that backward computes again."""
    model = synchronised()
    block = model.net[3]
    block.forward = lambda x: checkpoint(partial(Block.forward, block), x, use_reentrant=False)
    x, y = images(0, 0)
    rows, weight = hmf.distributed.share(BATCH)
    (weight * F.cross_entropy(model(x[rows], 0), y[rows])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_value():
    """A single value per channel, which one rank alone has."""
    model = synchronised()
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)[: int(dist.get_rank() == 0)]
    norm = model.net[1]
    try:
        with model.disabled():
            norm(x)
    except ValueError as error:
        return str(error)


def other_tasks():
    model = synchronised()
    x, _ = images(0, 0)
    tasks = torch.zeros(4, dtype=torch.int64)
    tasks[0] = int(dist.get_rank() == 0)
    return refusal(lambda: model(x[:4], tasks))


def own_statistics():
    return refusal(lambda: synchronised("own")(images(0, 0)[0], 0))


def averaged_statistics():
    """Without synchronisation: equal on all ranks, and the mean of what each has seen."""
    model = hmf.distributed.replicate(convnet())
    x, y = images(0, 0)
    rows, _ = hmf.distributed.share(BATCH)
    F.cross_entropy(model(x[rows], 1), y[rows]).backward()
    own = convnet()
    with torch.no_grad():
        own(x[rows], 1)
    mean = {name: averaged(b.clone(), False) for name, b in own.named_buffers() if "running" in name}
    return {name: b for name, b in model.named_buffers() if name in mean}, mean


def exported():
    model = synchronised("untracked")
    plain = model.export(0)
    kinds = {type(module) for module in plain.modules()}
    back = model.unconvert()
    return [kind.__name__ for kind in kinds | {type(module) for module in back.modules()}]


def refusals():
    said = [refusal(lambda: hmf.distributed.synchronise_batch_norm(convnet()))]
    replica = hmf.distributed.replicate(convnet("GroupNorm"))
    return [*said, refusal(lambda: hmf.distributed.synchronise_batch_norm(replica))]


CASES = {
    case.__name__: case
    for case in (
        *(in_evaluation, without_evaluation, one_sample_each, checkpointed, one_value, other_tasks, own_statistics),
        *(averaged_statistics, exported, refusals),
    )
}
