"""What each rank does in tests/distributed/test_shards.py: here, where a process can import it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import hypermask_fast as hmf

TASKS, BATCH = 3, 12
OPTIMISERS = {
    "torch": lambda model: torch.optim.Adam(model.parameters(), 1e-3, foreach=False),
    "default": lambda model: hmf.optim.Adam(model, 1e-3),
    "step_in_backward": lambda model: hmf.optim.Adam(model, 1e-3, step_in_backward=True),
}
MLPS = {"dense": {}, "chunked": {"chunk_size": 25}, "by_tensor": {"chunk_size": 40, "by_tensor": True}}
RESNETS = {"default resnet": {}, "official resnet": {}, "chunked resnet": {"chunk_size": 70}}
KINDS = MLPS | RESNETS
CASES = [
    *((kind, optimiser, torch.float64) for kind in MLPS for optimiser in OPTIMISERS),
    *((kind, "step_in_backward", torch.float64) for kind in RESNETS),
    *((kind, "step_in_backward", torch.float32) for kind in MLPS),
]
DRAWING = (1, 2, 4)  # so many ranks also draw the tasks of the output drift
DRAWN = [*((kind, "step_in_backward", torch.float64) for kind in MLPS), ("dense", "default", torch.float64)]
LONG = ("dense", "step_in_backward", torch.float64)  # as the trainer steps: 10 steps per task, the others 3
OF_MESH = [case for case in CASES if case[1:] == ("step_in_backward", torch.float64)]


class Block(torch.nn.Module):
    """Of a ResNet. Convolutions have no bias, whose gradient would be 0 but for rounding: Adam makes full steps of
    that."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = torch.nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = torch.nn.BatchNorm2d(outputs), torch.nn.BatchNorm2d(outputs)
        self.shortcut = torch.nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


def small_resnet(seed):
    torch.manual_seed(seed)
    pool = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    return torch.nn.Sequential(Block(2, 4, 1), Block(4, 6, 2), *pool, torch.nn.Linear(6, 3))


def small_net(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def small_model(kind="dense", dtype=torch.float64, seed=1):
    net = small_resnet(seed) if kind in RESNETS else small_net(seed)
    fidelity = "official" if kind.startswith("official") else "default"
    config = hmf.HypernetConfig(embedding=8, hidden=(12, 10), chunk_embedding=4, **KINDS[kind])
    settings = {"beta": 0.5, "lam": 0.02, "drift_norm": 2, "fidelity": fidelity}
    return hmf.HyperMask(net, TASKS, 20, config, **settings).to(dtype)


def whole(tensor):
    """All of a tensor on this rank."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def steps_of(case):
    return 10 if case == LONG else 3


def train(model, call, optimiser, steps, rank=0, ranks=1, dtype=torch.float64, drift_tasks=None):
    """Losses of all steps, and the parameters at the end; call: the model, or DistributedDataParallel's of it."""
    generator, losses = torch.Generator().manual_seed(0), []
    shape = (8,) if isinstance(model.net[0], torch.nn.Linear) else (2, 6, 6)
    for task in range(TASKS):
        optimizer = OPTIMISERS[optimiser](model)
        model.begin_task(task)
        for _ in range(steps):
            x = torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64).to(dtype)
            y = (x.flatten(1)[:, :2] > 0).sum(1).add(task).remainder(3)
            mine = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
            mask = model.mask(task, drift_tasks=drift_tasks)
            loss = F.cross_entropy(call(x[mine], mask), y[mine])
            drifts = model.drifts(mask)
            optimizer.zero_grad()
            (loss + model.drift.loss(drifts, task)).backward()
            optimizer.step()
            loss = (loss + model.drift.loss(drifts, task)).detach()  # with what backward has filled in
            if ranks > 1:
                dist.all_reduce(loss)
            losses.append(loss / ranks)
    return torch.stack(losses), {name: whole(tensor) for name, tensor in model.state_dict().items()}


def trained(rank, ranks, kind, optimiser, dtype, mesh=None, drift_tasks=None):
    model = hmf.distributed.shard(small_model(kind, dtype, seed=1 + rank), mesh)  # each rank begins elsewhere
    if kind in RESNETS:
        hmf.distributed.synchronise_batch_norm(model)
    call = DistributedDataParallel(model) if optimiser == "default" else model
    torch.manual_seed(7 + rank)  # and draws otherwise
    return train(model, call, optimiser, steps_of((kind, optimiser, dtype)), rank, ranks, dtype, drift_tasks)


def work():
    """All that one of the ranks does."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {case: trained(rank, ranks, *case) for case in CASES}
    if ranks in DRAWING:
        found |= {("drawn", *case): trained(rank, ranks, *case, drift_tasks=1) for case in DRAWN}
    if ranks == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        found |= {("mesh", *case): trained(rank, ranks, *case, mesh) for case in OF_MESH}
    return found
