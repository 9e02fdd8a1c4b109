"""Whether PyTorch follows a computation otherwise than by autograd's graph.

Within torch.func's transforms (vmap, grad, jvp, jacrev, ...), and within forward-mode differentiation, tensors pass for
ordinary ones. What PyTorch can't look into, a kernel or a node with a gradient of its own, would refuse them there in
words that help nobody, or lose derivatives without a word. PyTorch's own operations serve instead.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# There is no public way to ask.
_in_torch_func: Any = torch._C._are_functorch_transforms_active  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
_wrapped: Any = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001  # pyright: ignore


def transforming() -> bool:
    """Whether a transform of torch.func, or a level of forward-mode differentiation, is under way."""
    return _in_torch_func() or forward_ad._current_level >= 0  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


def stands_for_others(tensor: Tensor) -> bool:
    """Whether it is a transform's own tensor, whose values can't be looked at: under vmap there are many of them."""
    return _in_torch_func() and _wrapped(tensor)
