"""Triton kernels of the method, one file per op; needs triton and CUDA tensors (or TRITON_INTERPRET=1)."""

# A checkout on sys.path also offers this folder as a top-level `kernels`, the name of another package, which
# transformers looks for. Found so, it is empty: an import that fails would make theirs fail.
if __name__ != "kernels":
    from .chunk_masked_conv2d import chunk_masked_conv2d
    from .chunk_masked_linear import chunk_masked_linear
    from .entropy_select import entropy_select
    from .masked_conv2d import masked_conv2d
    from .masked_linear import masked_linear
    from .masked_weights import masked_weights
    from .semi_binary_mask import semi_binary_mask, semi_binary_mask_with_slope
    from .task_batched_linear import task_batched_linear
    from .weight_drift import weight_drift

__all__ = [
    "chunk_masked_conv2d",
    "chunk_masked_linear",
    "entropy_select",
    "masked_conv2d",
    "masked_linear",
    "masked_weights",
    "semi_binary_mask",
    "semi_binary_mask_with_slope",
    "task_batched_linear",
    "weight_drift",
]
