"""Runs an example's train() on given data, in a process of its own: framework.py EXAMPLE FILE [argument of train].

With the argument "sharded" the model is sharded where the example makes replicas.

FILE.RANK.pt then holds the losses of each task and the parameters after both.
"""

import importlib.util
import os
import sys

import torch
from torch import nn

import hypermask_fast as hmf

TASKS, SAMPLES = 2, 256


def model_and_data():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 2))
    model = hmf.HyperMask(net, TASKS, 30, hmf.HypernetConfig(8, (12,)), beta=1e-3, lam=1e-3, drift_norm=2)
    x = torch.randn(TASKS, SAMPLES, 20)
    y = torch.stack([(x[task, :, task] > 0).long() for task in range(TASKS)])
    return model, x, y


def shard_instead(model):
    """Frameworks clip by PyTorch's function, which can't take tensors and DTensors together."""
    torch.distributed.init_process_group("gloo")
    hmf.distributed.shard(model)
    hmf.distributed.replicate = lambda module: module if module is model else hmf.distributed.shard(module)
    nn.utils.clip_grad_norm_ = hmf.optim.clip_grad_norm_


def main() -> None:
    example, file, *more = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("example", example)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model, x, y = model_and_data()
    if "sharded" in more:
        more.remove("sharded")
        shard_instead(model)
    losses = [module.train(model, task, x[task], y[task], *map(bool, more)) for task in range(TASKS)]
    parameters = {name: getattr(p, "full_tensor", p.clone)().detach() for name, p in model.named_parameters()}
    torch.save((losses, parameters), f"{file}.{os.environ.get('RANK', '0')}.pt")


if __name__ == "__main__":
    main()
