"""Every op at any size, one function an op: what `python -m bench`, `bench.paths` and bench/micro measure.

The floor of a call counts the entries of each array once, however small it is beside the others: W stands for a target
weight of n entries, N for those of a whole network, H for the width of the hypernetwork's last hidden layer.
"""

from .common import BLOCK
from .inference import entropy_select
from .layers import (
    Convolution,
    chunk_masked_conv2d,
    chunk_masked_linear,
    masked_conv2d,
    masked_linear,
    task_batched_linear,
)
from .masks import (
    mask_overlap,
    mask_thresholds,
    masked_weights,
    masked_weights_drift,
    of_network,
    semi_binary_mask,
    weight_drift,
)
from .output_layer import (
    chunked_output_drift,
    factored_adam,
    hidden_gradient,
    hypernet_adam,
    hypernet_logits,
    output_drift,
    output_residuals,
)

__all__ = [
    "BLOCK",
    "Convolution",
    "chunk_masked_conv2d",
    "chunk_masked_linear",
    "chunked_output_drift",
    "entropy_select",
    "factored_adam",
    "hidden_gradient",
    "hypernet_adam",
    "hypernet_logits",
    "mask_overlap",
    "mask_thresholds",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "masked_weights_drift",
    "of_network",
    "output_drift",
    "output_residuals",
    "semi_binary_mask",
    "task_batched_linear",
    "weight_drift",
]
