"""What each process does in tests/distributed/test_wrapping.py."""

import contextlib
import copy
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hypermask_fast as hmf
from support import reducing
from support.loops import BATCH, Net, averaged, counted, data, mlp, train
from support.normalising import convnet, images
from support.reducing import gradients, loss_of
from support.told import refusal

replica = partial(reducing.replica, per_task=None)  # then every parameter is in every pass

LOOPS = [
    ("replicate", "SGD", "plain"),
    *(("replicate", "default", loop) for loop in ("accumulate", "clip")),
    *((how, "step_in_backward", "plain") for how in ("replicate", "shard")),
    ("shard", "default", "plain"),
]


class Wrapped(nn.Module):
    """A framework's module: the mask is made within its forward pass, or not."""

    def __init__(self, model):
        super().__init__()
        self.model, self.head = model, nn.Linear(3, 3).double()

    def forward(self, x, mask):
        return self.head(self.model(x, mask if isinstance(mask, hmf.TaskMask) else self.model.mask(mask)))


def loop(how, optimiser, kind):
    model = replica(how)
    return train(model, optimiser, kind, call=DistributedDataParallel(model, gradient_as_bucket_view=True))


def share_of(step=0, parts=1, part=0):
    x, y = (tensor.chunk(parts)[part] for tensor in data(0, step))
    rows, weight = hmf.distributed.share(len(x))
    return x[rows], y[rows], weight / parts


def who_sends():
    """What this library sends in a backward pass through DistributedDataParallel, and without."""
    model = replica()
    ddp, sent = DistributedDataParallel(model, gradient_as_bucket_view=True), []
    for call in (ddp, model, ddp):
        model.zero_grad()
        loss = loss_of(model, call=call)
        with counted() as numbers:
            loss.backward()
        sent.append(len(numbers))
    return sent, gradients(model)


def without_synchronisation():
    """Accumulation with no_sync: gradients are sent with the last part."""
    model = replica()
    ddp, sent = DistributedDataParallel(model), []
    for part in range(2):
        x, y, weight = share_of(parts=2, part=part)
        with ddp.no_sync() if part == 0 else contextlib.nullcontext(), counted() as numbers:
            mask = model.mask(0)
            (weight * F.cross_entropy(ddp(x, mask), y) + 0.5 * model.regularizer(mask)).backward()
        sent.append(len(numbers))
    return sent, gradients(model)


def past_the_wrapper():
    """A pass through the module inside, as who forgets the wrapper makes it."""
    model = replica()
    ddp = DistributedDataParallel(model)
    loss_of(model, call=ddp).backward()
    model.zero_grad()
    loss_of(model, call=ddp.module).backward()
    return gradients(model)


def after_a_pass_without_backward():
    """DistributedDataParallel still averages at the next backward pass, wherever that comes from."""
    model = replica()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    ddp(share_of()[0], 0)
    with counted() as first:
        loss_of(model).backward()
    model.zero_grad()
    with counted() as second:
        loss_of(model).backward()
    return len(first), len(second), gradients(model)


def after_an_evaluation():
    model = replica()
    ddp = DistributedDataParallel(model)
    with torch.no_grad():
        ddp(share_of()[0], 0)
    loss_of(model).backward()
    return gradients(model)


def in_a_block():
    """A pass through the network itself, after one through the wrapper."""
    model = replica()
    loss_of(model, call=DistributedDataParallel(model)).backward()
    model.zero_grad()
    x, y, weight = share_of()
    with model.use_task(0) as mask:
        (weight * F.cross_entropy(model.net(x), y) + model.regularizer(mask)).backward()
    return gradients(model)


def in_a_wrapper(mask_inside, **settings):
    wrapped = hmf.distributed.replicate(Wrapped(replica()))
    ddp = DistributedDataParallel(wrapped, **settings)
    model, (x, y, weight) = wrapped.model, share_of()
    with counted() as sent:
        (weight * F.cross_entropy(ddp(x, 0 if mask_inside else model.mask(0)), y)).backward()
    return len(sent), gradients(wrapped)


def statistics():
    """Under DistributedDataParallel: the ranks' means, though it takes the first rank's."""
    model = hmf.distributed.replicate(convnet())
    ddp, own = DistributedDataParallel(model), convnet()
    x, y = images(0, 0)
    rows, _ = hmf.distributed.share(BATCH)
    F.cross_entropy(ddp(x[rows], 1), y[rows]).backward()
    with torch.no_grad():
        own(x[rows], 1)
    mean = {name: averaged(b.clone(), False) for name, b in own.named_buffers() if "running" in name}
    return {name: b for name, b in model.named_buffers() if name in mean}, mean


def synchronised():
    model = hmf.distributed.synchronise_batch_norm(hmf.distributed.replicate(convnet()))
    return train(model, "default", call=DistributedDataParallel(model), batch=images)


def fsdp1(module, **settings):
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), **settings)


def shards():
    """By name, what a model says that others have sharded; each must say it before its first step."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = data(0, 0)[0]

    def of(change, call=lambda model: model.mask(0), made=mlp):
        model = made()
        change(model)
        return refusal(lambda: call(model))

    def whole_network(net):
        fully_shard(net, mesh=mesh)
        return hmf.HyperMask(net, 2)

    colwise = {"first": ColwiseParallel()}
    found = {
        "the network": of(lambda model: fully_shard(model.net, mesh=mesh)),
        "a layer": of(lambda model: fully_shard(model.net.first, mesh=mesh)),
        "a layer that is not masked": of(lambda model: fully_shard(model.net.table, mesh=mesh)),
        "the hypernetwork": of(lambda model: fully_shard(model.hypernet, mesh=mesh)),
        "its output layer": of(lambda model: fully_shard(model.hypernet.output, mesh=mesh)),
        "the model": of(lambda model: fully_shard(model, mesh=mesh)),
        "a replica": of(lambda model: fully_shard(model, mesh=mesh), made=replica),
        "in a pass": of(lambda model: fully_shard(model, mesh=mesh), lambda model: model(x, 0)),
        "shards of shards": of(lambda model: fully_shard(model.net, mesh=mesh), made=partial(replica, "shard")),
        "sharded after": of(lambda model: fully_shard(model, mesh=mesh), hmf.distributed.shard),
        "replicated after": of(lambda model: fully_shard(model, mesh=mesh), hmf.distributed.replicate),
        "before": refusal(lambda: whole_network(Net().double())),
        "FSDP1": of(lambda model: fsdp1(model)),
        "FSDP1 of original parameters": of(lambda model: fsdp1(model, use_orig_params=True)),
        "FSDP1 of the network": of(lambda model: fsdp1(model.net, use_orig_params=True)),
        "tensor parallel": of(lambda model: parallelize_module(model.net, mesh, colwise)),
    }
    model = mlp()
    wrapped = fsdp1(model)
    return found | {"FSDP1 in a pass": refusal(lambda: wrapped(x, 0))}


def others():
    said = []
    model = mlp()
    inner = DistributedDataParallel(model.net)
    with model.use_task(0):
        said.append(refusal(lambda: inner(data(0, 0)[0])))
    wrapped = DistributedDataParallel(Wrapped(replica()), find_unused_parameters=True)
    said.append(refusal(lambda: wrapped(data(0, 0)[0], 0)))
    per_task = DistributedDataParallel(reducing.replica())
    said.append(refusal(lambda: per_task(data(0, 0)[0], 0)))
    beside = copy.deepcopy(Wrapped(mlp()))
    fully_shard(beside.head, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    said.append(refusal(lambda: hmf.distributed.replicate(beside)(data(0, 0)[0], 0).sum().backward()))
    return said


CASES = {
    "who sends": who_sends,
    "no_sync": without_synchronisation,
    "past the wrapper": past_the_wrapper,
    "without backward": after_a_pass_without_backward,
    "evaluation": after_an_evaluation,
    "block": in_a_block,
    "mask inside": partial(in_a_wrapper, True),
    "mask outside": partial(in_a_wrapper, False),
    "unused": partial(in_a_wrapper, True, find_unused_parameters=True),
    "statistics": statistics,
    "synchronised": synchronised,
    "shards": shards,
    "others": others,
}


def work():
    return {case: loop(*case) for case in LOOPS} | {name: case() for name, case in CASES.items()}
