"""Adam's step of many tensors in a call, and its counters alone; for the CPU."""

import torch

from . import operator

_fused_adam = operator("fused_adam", lambda *args: None)
count_steps = operator("count_steps", lambda steps: None)


def fused_adam(weights, grads, first, second, steps, *settings):
    """One step of PyTorch's fused Adam, counted in `steps`; settings: lr, beta1, beta2, eps, weight_decay, decoupled,
    maximize. Only the weights are ever part of a graph."""
    if not weights:
        return
    _fused_adam(weights, grads, first, second, steps, *settings)
    torch.autograd.graph.increment_version(weights)
