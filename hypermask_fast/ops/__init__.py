"""Every op of the method, one entry each; also `hypermask_fast.functional`.

An entry names the op's definition in `reference`, the rule that its arguments must keep in `arguments`, and who offers
it: "plain" (PyTorch's own products), the extension on the CPU and on CUDA (`native`), and Triton's kernels. Names,
arguments, results and gradients are the definition's; every op also takes `backend=`, a name. `registry` says how the
backend is chosen where none is named, and `explain` which one that is.

Contiguous float32 tensors are accelerated. Other strides are made contiguous, but for what an
op steps in place; other dtypes go to the reference or to plain PyTorch products.
"""

from . import arguments, native, reference, triton
from .native import dense, few_rows, masks, overlap, thresholds
from .paths import Layer
from .plain import chunked, mask_first
from .reference import kept_rank
from .registry import OPS, Offer, Op, explain, may_fuse, use_backend

__all__ = [
    "OPS",
    "Op",
    "chunk_masked_conv2d",
    "chunk_masked_linear",
    "chunked_output_drift",
    "entropy_select",
    "explain",
    "factored_adam",
    "hidden_gradient",
    "hypernet_adam",
    "hypernet_logits",
    "kept_rank",
    "mask_overlap",
    "mask_thresholds",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "masked_weights_drift",
    "may_fuse",
    "output_drift",
    "output_residuals",
    "semi_binary_mask",
    "task_batched_linear",
    "use_backend",
    "weight_drift",
]

# -- masks -------------------------------------------------------------------------------------------------------------

mask_thresholds = Op(
    reference.mask_thresholds,
    arguments.mask_thresholds,
    None,
    arguments.kept_ranks,
    **native.offers(thresholds.mask_thresholds),
)

semi_binary_mask = Op(
    reference.semi_binary_mask,
    arguments.semi_binary_mask,
    **native.offers(masks.semi_binary_mask, masks.semi_binary_mask_condition),
    triton=triton.offer("semi_binary_mask"),
)

masked_weights = Op(
    reference.masked_weights,
    arguments.masked_weights,
    **native.offers(masks.masked_weights, masks.masked_weights_condition),
    triton=triton.offer("masked_weights", triton.of_one_dtype),
)

weight_drift = Op(
    reference.weight_drift,
    arguments.weight_drift,
    **native.offers(masks.weight_drift, masks.weight_drift_condition),
    triton=triton.offer("weight_drift", triton.of_one_dtype),
)

masked_weights_drift = Op(
    reference.masked_weights_drift,
    arguments.masked_weights_drift,
    **native.offers(masks.masked_weights_drift, masks.masked_weights_drift_condition),
)

mask_overlap = Op(
    reference.mask_overlap,
    arguments.mask_overlap,
    **native.offers(overlap.mask_overlap, overlap.mask_overlap_condition),
)

# -- layers ------------------------------------------------------------------------------------------------------------

masked_linear = Op(
    reference.masked_linear,
    arguments.masked_linear,
    Layer(),
    plain=Offer(mask_first.masked_linear),
    cpu=Offer(masks.masked_linear, masks.layer_condition),
    cuda=Offer(few_rows.masked_linear, few_rows.masked_linear_condition, dtypes=few_rows.DTYPES),
    triton=triton.offer("masked_linear"),
)

masked_conv2d = Op(
    reference.masked_conv2d,
    arguments.masked_conv2d,
    Layer(stride_at=5),
    plain=Offer(mask_first.masked_conv2d),
    cpu=Offer(masks.masked_conv2d, masks.layer_condition),
    triton=triton.offer("masked_conv2d"),
)

chunk_masked_linear = Op(
    reference.chunk_masked_linear,
    arguments.chunk_masked_linear,
    Layer(generated=True),
    plain=Offer(mask_first.chunk_masked_linear),
    cuda=Offer(few_rows.chunk_masked_linear, few_rows.chunk_masked_linear_condition, dtypes=few_rows.CHUNK_DTYPES),
    triton=triton.offer("chunk_masked_linear"),
)

chunk_masked_conv2d = Op(
    reference.chunk_masked_conv2d,
    arguments.chunk_masked_conv2d,
    Layer(stride_at=8, generated=True),
    plain=Offer(mask_first.chunk_masked_conv2d),
    triton=triton.offer("chunk_masked_conv2d"),
)

task_batched_linear = Op(
    reference.task_batched_linear,
    arguments.task_batched_linear,
    Layer(of_tasks=True),
    plain=Offer(mask_first.task_batched_linear),
    triton=triton.offer("task_batched_linear"),
)

# -- hypernetwork ------------------------------------------------------------------------------------------------------

hypernet_logits = Op(
    reference.hypernet_logits,
    arguments.hypernet_logits,
    plain=Offer(chunked.hypernet_logits, form=chunked.hypernet_logits_form),
    **native.offers(dense.hypernet_logits, dense.hypernet_logits_condition, dense.hypernet_logits_form),
)

output_drift = Op(
    reference.output_drift,
    arguments.output_drift,
    **native.offers(dense.output_drift, dense.output_drift_condition),
)

chunked_output_drift = Op(
    reference.chunked_output_drift, arguments.chunked_output_drift, plain=Offer(chunked.output_drift)
)

hypernet_adam = Op(
    reference.hypernet_adam,
    arguments.hypernet_adam,
    **native.offers(dense.hypernet_adam, dense.hypernet_adam_condition),
)

output_residuals = Op(
    reference.output_residuals,
    arguments.output_residuals,
    **native.offers(dense.output_residuals, dense.output_residuals_condition),
)

hidden_gradient = Op(
    reference.hidden_gradient,
    arguments.hidden_gradient,
    **native.offers(dense.hidden_gradient, dense.hidden_gradient_condition),
)

factored_adam = Op(
    reference.factored_adam,
    arguments.factored_adam,
    **native.offers(dense.factored_adam, dense.factored_adam_condition),
)

# -- inference ---------------------------------------------------------------------------------------------------------

entropy_select = Op(reference.entropy_select, arguments.entropy_select, triton=triton.offer("entropy_select"))
