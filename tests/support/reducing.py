"""What each process does in tests/distributed/test_reducer.py."""

import copy
import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf
from support.loops import BATCH, counted, data, mlp, state, train
from support.told import refusal

PARTS = ("accumulate", "clip", "mixed")
LOOPS = [
    *(("replicate", optimiser, None, loop) for optimiser in ("SGD", "default") for loop in PARTS),
    *(("replicate", optimiser, None, "plain") for optimiser in ("SGD", "Adam", "default", "step_in_backward")),
    ("replicate", "default", 30, "plain"),
    *(("shard", "default", None, loop) for loop in ("plain", *PARTS)),
    ("shard", "step_in_backward", None, "plain"),
    ("shard", "default", 30, "plain"),
]


def replica(how="replicate", **settings):
    """Each rank begins elsewhere."""
    return getattr(hmf.distributed, how)(mlp(1 + dist.get_rank(), **settings))


def loops():
    found = {case: train(replica(case[0], chunk_size=case[2]), case[1], case[3]) for case in LOOPS}
    return found | {"cases": {name: case() for name, case in CASES.items()}}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and "hyper" not in name}


def loss_of(model, task=0, step=0, call=None):
    x, y = data(task, step)
    rows, weight = hmf.distributed.share(BATCH)
    mask = model.mask(task)
    return weight * F.cross_entropy((call or model)(x[rows], mask), y[rows]) + model.regularizer(mask)


def backward(model, task=0):
    loss_of(model, task).backward()
    return gradients(model)


def a_gradient_of_one_rank_alone():
    """`extra` is used by rank 0 only: the mean is a K-th of its gradient, on every rank."""
    model = replica()
    model.net.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.net.never = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model.mask(0)
    loss = loss_of(model)
    if dist.get_rank() == 0:
        loss = loss + (2 * model.net.extra).sum()
    loss.backward()
    return model.net.extra.grad, model.net.never.grad is None


def asked_for_alone():
    """torch.autograd.grad leaves .grad as it is and sends nothing that one rank alone may not send."""
    model = replica()
    weight = model.net.first.weight
    loss = loss_of(model)
    if dist.get_rank() == 0:
        torch.autograd.grad(loss, weight, retain_graph=True)
        assert weight.grad is None
    loss.backward()
    return gradients(model)


def graph_passed_twice():
    model = replica()
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    loss.backward()
    return gradients(model)


def computed_again(model, reentrant=None):
    """With activations that backward computes again, and a shared parameter read there; reentrant None: kept."""
    first, forward = model.net.first, nn.Linear.forward

    def part(x):
        return forward(first, x) + model.net.shift

    first.forward = part if reentrant is None else lambda x: checkpoint(part, x, use_reentrant=reentrant)
    x, y = data(0, 0)
    rows, weight = hmf.distributed.share(BATCH)
    loss = weight * F.cross_entropy(model(x[rows].requires_grad_(), 0), y[rows]) + model.regularizer(0)
    loss.backward()
    return gradients(model)


def after_a_pass_that_failed():
    model = replica()

    def fail(grad):
        raise ValueError

    x, y = data(0, 0)
    output = model(x, 0)
    output.register_hook(fail)
    for raises in (True, False):
        try:
            loss = F.cross_entropy(output, y) if raises else loss_of(model)
            (loss + model.net.shift.sum()).backward()
        except ValueError:
            model.zero_grad()
    found = gradients(model)
    found["net.shift"] -= 1
    return found


def frozen_and_thawed():
    model = replica()
    model.net.first.weight.requires_grad_(False)
    before = backward(model)
    model.net.first.weight.requires_grad_(True)
    model.zero_grad()
    return "net.first.weight" in before, backward(model)


def loaded_by_assignment():
    model = replica()
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
    return backward(model)


def of_a_copy():
    wrapped = nn.Sequential(replica())
    model = copy.deepcopy(wrapped)[0]
    assert model.reducer is not wrapped[0].reducer and model.reducer.modules == (model,)
    return backward(model)


def of_a_task_added_later():
    model = replica()
    torch.manual_seed(dist.get_rank())
    model.add_task(like=0)
    loss_of(model, 2).backward()
    return {f"own.{i}": p.grad.clone() for i, p in enumerate(model.own.parameters()) if p.grad is not None}


def of_a_wrapper(how="replicate"):
    """With a layer of its own, and the model joined alone before."""
    torch.manual_seed(1)
    wrapped = nn.Sequential(replica(how), nn.Linear(3, 3).double())
    getattr(hmf.distributed, how)(wrapped)
    if how == "replicate":
        hmf.distributed.replicate(wrapped[0])
    x, y = data(0, 0)
    rows, weight = hmf.distributed.share(BATCH)
    (weight * F.cross_entropy(wrapped[1](wrapped[0](x[rows], 0)), y[rows])).backward()
    return wrapped[1].weight.grad


def sparse():
    model = replica(sparse=True)
    return backward(model)


def of_several_dtypes():
    model = replica(dtype=torch.float32)
    model.net.table.double()
    forward = model.net.table.forward
    model.net.table.forward = lambda x: forward(x).float()
    x, y = data(0, 0, dtype=torch.float32)
    rows, weight = hmf.distributed.share(BATCH)
    (weight * F.cross_entropy(model(x[rows], 0), y[rows])).backward()
    return gradients(model)


def in_half_precision():
    """The sum of so large gradients would not be finite in float16."""
    model = replica()
    model.net.narrow = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    model.mask(0)
    (loss_of(model) + (model.net.narrow * 4e4).sum()).backward()
    return model.net.narrow.grad


def scaled():
    """A GradScaler's overflow on one rank skips the step on all."""
    model = replica(dtype=torch.float32)
    before = state(model)
    optimizer = hmf.optim.Adam(model)
    scaler = torch.amp.GradScaler("cpu")
    x, y = data(0, 0, dtype=torch.float32)
    rows, weight = hmf.distributed.share(BATCH)
    loss = weight * F.cross_entropy(model(x[rows], 0), y[rows])
    scaler.scale(loss * (float("inf") if dist.get_rank() == 0 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.get_scale(), all(torch.equal(before[name], value) for name, value in state(model).items())


def stepped_by_a_hook():
    model = replica()
    weight = model.net.first.weight

    def step(parameter):
        parameter.data -= parameter.grad
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(step)
    return refusal(loss_of(model).backward)


def other_tasks():
    """Each rank its own task: refused where the gradients would be averaged."""
    model = replica(tasks=3)
    said = refusal(loss_of(model, 1 + dist.get_rank() % 2).backward)
    model = replica()
    return said, backward(model)


def all_reduces():
    """Numbers sent in a step of a replica: of the logits' gradient with the drift's, and of all others."""
    model = replica()
    optimizer = hmf.optim.Adam(model)
    optimizer.zero_grad()
    loss = loss_of(model)
    with counted() as sent:
        loss.backward()
    others = [p for name, p in model.named_parameters() if not name.startswith("hypernet")]
    return sent, model.layout.size, sum(p.numel() for p in others), len(others)


def penalty_alone():
    """A backward pass without any mask."""
    model = copy.deepcopy(replica())
    with model.disabled():
        (dist.get_rank() * model.net.shift.sum()).backward()
    return model.net.shift.grad[0]


def trained_alone():
    model = mlp()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            loss_of(model).backward()
    return [str(warning.message) for warning in said]


CASES = {
    "one rank alone": a_gradient_of_one_rank_alone,
    "autograd.grad": asked_for_alone,
    "retain_graph": graph_passed_twice,
    "checkpoint": lambda: computed_again(replica(), False),
    "reentrant checkpoint": lambda: computed_again(replica(), True),
    "failed": after_a_pass_that_failed,
    "frozen": frozen_and_thawed,
    "assigned": loaded_by_assignment,
    "copy": of_a_copy,
    "added": of_a_task_added_later,
    "wrapper": of_a_wrapper,
    "wrapper of shards": lambda: of_a_wrapper("shard"),
    "sparse": sparse,
    "dtypes": of_several_dtypes,
    "half": in_half_precision,
    "scaler": scaled,
    "hook": stepped_by_a_hook,
    "other tasks": other_tasks,
    "sent": all_reduces,
    "penalty": penalty_alone,
    "alone": trained_alone,
}
