"""What each of two processes does in tests/distributed/test_replicas.py: here, where a process can import it."""

import copy
import pickle

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import hypermask_fast as hmf
from support.told import refusal

RANKS, STEPS, TASKS = 2, 4, 2
ADAM = {
    "torch": lambda model: torch.optim.Adam(model.parameters(), 1e-2),
    "default": lambda model: hmf.optim.Adam(model, 1e-2),
    "step_in_backward": lambda model: hmf.optim.Adam(model, 1e-2, step_in_backward=True),
}


def small_model(seed=1, chunk_size=None, dtype=torch.float64):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    config = hmf.HypernetConfig(embedding=8, hidden=(12,), chunk_size=chunk_size)
    return hmf.HyperMask(net, TASKS, 20, config, beta=0.5, lam=0.02, drift_norm=2).to(dtype)


def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TASKS, STEPS, RANKS, 16, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (TASKS, STEPS, RANKS, 16), generator=generator)


def train(model, call, rank, make, loop="plain", begins=True):
    """call: the model, or DistributedDataParallel's of it; rank None: one process that has all ranks' batches."""
    x, y = batches()
    for task in range(TASKS):
        optimizer = make(model)
        if begins:
            model.begin_task(task)
        for step in range(STEPS):
            mine = (x[task, step, rank], y[task, step, rank]) if rank is not None else (
                x[task, step].flatten(0, 1), y[task, step].flatten()
            )  # fmt: skip
            optimizer.zero_grad()
            for part in range(2 if loop == "accumulate" else 1):
                mask = model.mask(task)
                inputs = [t.view(RANKS if rank is None else 1, 16, *t.shape[1:]) for t in mine]
                if loop == "accumulate":
                    inputs = [t[:, 8 * part : 8 * part + 8] for t in inputs]
                a, b = (t.flatten(0, 1) for t in inputs)
                loss = F.cross_entropy(call(a, mask), b) + model.regularizer(mask)
                if loop == "mixed":
                    tasks = torch.arange(len(a)) % TASKS if rank is None else (torch.arange(16) + 16 * rank) % TASKS
                    loss = loss + F.cross_entropy(call(a, tasks), b)
                loss.backward()
            if loop == "clip":
                hmf.optim.clip_grad_norm_(model, 0.05)
            optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def replicated(rank, optimiser, chunk_size, loop, begins):
    model = hmf.distributed.replicate(small_model(1 + rank, chunk_size))  # each rank begins elsewhere
    return train(model, DistributedDataParallel(model), rank, ADAM[optimiser], loop, begins)


CASES = [
    *((name, None, "plain", True) for name in ADAM),
    *(("default", None, loop, True) for loop in ("clip", "accumulate", "mixed")),
    ("torch", None, "plain", False),
    ("default", 50, "plain", False),
]


class Wrapped(torch.nn.Module):
    """As a framework's module, with the loss inside."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, task):
        mask = self.model.mask(task)
        return F.cross_entropy(self.model(x, mask), y) + self.model.regularizer(mask)


def in_a_wrapper(rank, replicates):
    model = small_model(1)
    wrapped = Wrapped(model)
    if replicates:
        hmf.distributed.replicate(wrapped)
    net = DistributedDataParallel(wrapped, find_unused_parameters=not replicates)
    x, y = batches()
    optimizer = hmf.optim.Adam(net, 1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        net(x[0, step, rank], y[0, step, rank], 0).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def new_task(rank):
    torch.manual_seed(rank)
    model = copy.deepcopy(hmf.distributed.replicate(small_model(1)))
    model.add_task()
    return model.hypernet.embeddings[TASKS].detach()


def refusals():
    model = small_model(1)
    said = [refusal(lambda: DistributedDataParallel(model))]
    optimizer = hmf.optim.Adam(model, step_in_backward=True)
    optimizer.zero_grad()
    before = model.hypernet.output.weight.clone()
    said.append(refusal(model.mask(0).logits.sum().backward))
    assert torch.equal(model.hypernet.output.weight, before)
    copied = pickle.loads(pickle.dumps(hmf.distributed.replicate(small_model(1))))
    said.append(refusal(lambda: DistributedDataParallel(copied)))
    return [*said, refusal(lambda: hmf.HyperMask(DistributedDataParallel(torch.nn.Linear(3, 2)), 1))]


def work():
    """All that one of two ranks does."""
    rank = dist.get_rank()
    found = {case: replicated(rank, *case) for case in CASES}
    found |= {f"wrapper {replicates}": in_a_wrapper(rank, replicates) for replicates in (True, False)}
    return found | {"new task": new_task(rank), "refusals": refusals()}
