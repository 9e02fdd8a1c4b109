"""What loops have around a step: hooks, frozen parts, settings and schedulers, other tasks, copies."""

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hypermask_fast as hmf

from ..loop import FEATURES, TASKS, Feature, Loop, feature
from .gradients import plain

# -- hooks -------------------------------------------------------------------------------------------------------------


def hook_on(find: Callable[[Loop], Tensor]) -> Callable[[Loop], None]:
    def begin(loop: Loop) -> None:
        if "hook" not in loop.kept:
            loop.kept["hook"] = find(loop).register_hook(lambda grad: 0.5 * grad)

    return begin


FEATURES["a hook on the layer's weight"] = Feature(plain, begin=hook_on(lambda loop: loop.weight))
FEATURES["a hook on the layer's bias"] = Feature(plain, begin=hook_on(lambda loop: loop.model.hypernet.output.bias))
FEATURES["a hook on an embedding"] = Feature(plain, begin=hook_on(lambda loop: loop.model.hypernet.embeddings[0]))


def double(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.mul_(2.0)


def hook_after(loop: Loop) -> None:
    if "hook" not in loop.kept:
        loop.kept["hook"] = loop.weight.register_post_accumulate_grad_hook(double)


FEATURES["a hook after accumulation"] = Feature(plain, begin=hook_after)


@feature("a hook on the mask's logits")
def hook_on_logits(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    mask = loop.model.mask(loop.task)
    mask.logits.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    loss = F.cross_entropy(loop.model(loop.x[loop.step], mask), loop.y[loop.step]) + loop.model.regularizer(mask)
    loss.backward()
    loop.optimizer.step()


# -- parts frozen ------------------------------------------------------------------------------------------------------


def freeze(parts: Callable[[hmf.HyperMask], Iterable[Tensor]]) -> Callable[[Loop], None]:
    def begin(loop: Loop) -> None:
        for p in parts(loop.model):
            p.requires_grad_(False)

    return begin


def below(model: hmf.HyperMask) -> list[Tensor]:
    return [*model.hypernet.trunk.parameters(), *model.hypernet.embeddings]


FROZEN: dict[str, Callable[[hmf.HyperMask], Iterable[Tensor]]] = {
    "the output layer frozen": lambda model: model.hypernet.output.parameters(),
    "the layer's weight frozen": lambda model: [model.hypernet.output.weight],
    "the layer's bias frozen": lambda model: [model.hypernet.output.bias],
    "trunk and embeddings frozen": below,
    "everything frozen but the layer": lambda model: [*below(model), *model.net.parameters()],
    "the target network frozen": lambda model: model.net.parameters(),
}
FEATURES |= {name: Feature(plain, begin=freeze(parts)) for name, parts in FROZEN.items()}


def frozen_later(loop: Loop) -> None:
    loop.weight.requires_grad_(loop.step % 5 != 3)
    plain(loop)
    loop.weight.requires_grad_(True)


FEATURES["the layer frozen in every fifth step"] = Feature(frozen_later)

# -- settings ----------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "weight_decay": {"weight_decay": 0.1, "lr": 3e-3},
    "AdamW": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "lr": 3e-4},
    "maximize and weight_decay": {"maximize": True, "weight_decay": 0.1, "lr": 1e-3},
    "amsgrad": {"amsgrad": True},
    "other betas and eps": {"betas": (0.8, 0.95), "eps": 1e-4},
    "foreach": {"foreach": True},
    "not fused": {"fused": False},
    "lr as a tensor": {"lr": torch.tensor(1e-2)},
}
FEATURES |= {name: Feature(plain, settings) for name, settings in SETTINGS.items()}


def in_groups(loop: Loop) -> None:
    for group in loop.optimizer.param_groups:
        group.update(weight_decay=0.05, maximize=False, lr=3e-3, amsgrad=loop.task == 1)


def from_state(loop: Loop) -> None:
    other = torch.optim.Adam(loop.model.parameters(), lr=5e-3, weight_decay=0.1, amsgrad=loop.task == 2)
    loop.optimizer.load_state_dict(other.state_dict())


FEATURES["settings changed in param_groups"] = Feature(plain, after=in_groups)
FEATURES["settings from a loaded state_dict"] = Feature(plain, after=from_state)


def own_group(loop: Loop) -> None:
    """The layer's weight by itself."""
    optimizer = loop.optimizer
    optimizer.param_groups[0]["params"] = [p for p in optimizer.param_groups[0]["params"] if p is not loop.weight]
    optimizer.add_param_group({"params": [loop.weight], "lr": 3e-3, "weight_decay": 0.1})


FEATURES["a group of its own for the layer"] = Feature(plain, after=own_group)


def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[Loop], None]:
    def step(loop: Loop) -> None:
        scheduler = loop.keep("scheduler", lambda: make(loop.optimizer))
        if loop.step == 7:
            loop.model.add_task(loop.optimizer)
        plain(loop)
        scheduler.step()

    return step


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR, a task added on the way": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "CosineAnnealingWarmRestarts, a task added on the way": lambda o: (
        torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 6)
    ),
}
FEATURES |= {name: Feature(scheduled(make)) for name, make in SCHEDULERS.items()}

# -- what a step consists of -------------------------------------------------------------------------------------------


@feature("the task as a tensor")
def tensor_task(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loop.loss(task=torch.tensor(loop.task)).backward()
    loop.optimizer.step()


@feature("no mask kept: model(x, task) and regularizer(task)", waits=True)
def no_mask(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loss = F.cross_entropy(loop.model(loop.x[loop.step], loop.task), loop.y[loop.step])
    (loss + loop.model.regularizer(loop.task)).backward()
    loop.optimizer.step()


@feature("a backward pass of the cross-entropy, and one of the regulariser", waits=True)
def apart(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    mask = loop.model.mask(loop.task)
    F.cross_entropy(loop.model(loop.x[loop.step], mask), loop.y[loop.step]).backward(retain_graph=True)
    loop.model.regularizer(mask).backward()
    loop.optimizer.step()


@feature("torch.utils.checkpoint around the model")
def checkpointed(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    mask = loop.model.mask(loop.task)
    output = checkpoint(loop.model, loop.x[loop.step], mask, use_reentrant=False)
    (F.cross_entropy(output, loop.y[loop.step]) + loop.model.regularizer(mask)).backward()
    loop.optimizer.step()


@feature("torch.utils.checkpoint around the model, the mask made in it", waits=True)
def checkpointed_by_task(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    output = checkpoint(loop.model, loop.x[loop.step], loop.task, use_reentrant=False)
    (F.cross_entropy(output, loop.y[loop.step]) + loop.model.regularizer(loop.task)).backward()
    loop.optimizer.step()


@feature("an earlier task rehearsed in the same step", settings={"lr": 5e-3}, waits=True)
def rehearsed(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss()
    if loop.task > 0:
        loss = loss + F.cross_entropy(loop.model(loop.x[loop.step], 0), loop.y[loop.step])
    loss.backward()
    loop.optimizer.step()


@feature("a mixed batch in the same step", waits=True)
def mixed(loop: Loop) -> None:
    loop.optimizer.zero_grad()
    tasks = torch.arange(32) % TASKS
    (loop.loss() + F.cross_entropy(loop.model(loop.x[loop.step], tasks), loop.y[loop.step])).backward()
    loop.optimizer.step()


# -- copies ------------------------------------------------------------------------------------------------------------


@feature("model and optimiser copied")
def copied(loop: Loop) -> None:
    if loop.step == 10:
        loop.model, loop.optimizer = copy.deepcopy((loop.model, loop.optimizer))
    plain(loop)


@feature("model and optimiser pickled")
def pickled(loop: Loop) -> None:
    if loop.step == 10:
        loop.model, loop.optimizer = pickle.loads(pickle.dumps((loop.model, loop.optimizer)))
    plain(loop)


@feature("an older optimiser still there", waits=True)
def older(loop: Loop) -> None:
    """A new torch.optim.Adam takes over in the middle of a task."""
    if loop.step == 10:
        loop.kept["older"] = loop.optimizer
        loop.optimizer = torch.optim.Adam(loop.model.parameters(), 1e-2)
    plain(loop)


def column_slices(loop: Loop) -> None:
    """The target's first weight as every second column of a larger tensor: not contiguous."""
    if loop.task == 0:
        layer = loop.model.net.get_submodule("0")
        with torch.no_grad():
            weight = torch.stack([layer.weight, layer.weight], dim=-1).flatten(1)[:, ::2]
        layer.weight.data = weight


FEATURES["target weights that are columns of a larger tensor"] = Feature(plain, begin=column_slices)
