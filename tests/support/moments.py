"""What ranks do in tests of moments in bfloat16: here, where a process can import it."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import hypermask_fast as hmf
from hypermask_fast.processes import whole

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 2


def small_model(chunk_size=None, tasks=2):
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    config = hmf.HypernetConfig(embedding=8, hidden=(13,), chunk_size=chunk_size)
    return hmf.HyperMask(net, tasks, 20, config, beta=0.01, lam=1e-3)


def train(model, optimizer, steps, task=0):
    for _ in range(steps):
        mask = model.mask(task)
        optimizer.zero_grad()
        (F.cross_entropy(model(X, mask), Y) + model.regularizer(mask)).backward()
        optimizer.step()


def moments_of(model, optimizer):
    state = optimizer.state[model.hypernet.output.weight]
    return state["exp_avg"], state["exp_avg_sq"]


def after_a_step(rank, how):
    """Both moments, whole, after one step by all ranks; and those that a state_dict of whole moments gives."""
    dist.init_process_group("gloo")
    model = getattr(hmf.distributed, how)(small_model())
    found = []
    for in_backward in (False, True):
        optimizer = hmf.optim.Adam(model, 1e-2, moments="bfloat16", step_in_backward=in_backward)
        train(model, optimizer, 1)
        found.append([whole(x) for x in moments_of(model, optimizer)])
        again = hmf.optim.Adam(model, 1e-2, moments="bfloat16")
        again.load_state_dict(optimizer.state_dict())
        found.append([whole(x) for x in moments_of(model, again)])
    return found
