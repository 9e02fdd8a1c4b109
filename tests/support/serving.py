"""Small models to serve, and the same passes without a cache."""

import pytest
import torch
from torch import nn

import hypermask_fast as hmf
from hypermask_fast.ops import native

checks_fast = pytest.mark.skipif(bool(native.PROBLEM), reason="without the extension W * m is kept in serving() only")
SHAPES = {
    "dense": hmf.HypernetConfig(embedding=4, hidden=(8,)),
    "chunked": hmf.HypernetConfig(embedding=4, hidden=(8,), chunk_size=20, chunk_embedding=3),
}


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def model_of(shape="dense", tasks=3, sparsity=30.0, **how):
    torch.manual_seed(0)
    return hmf.HyperMask(network(), tasks, sparsity, SHAPES[shape], **how).eval()


def uncached(model, *inputs, **kwargs):
    """The same pass as the model makes it without its cache."""
    limit, model.cache.limit = model.cache.limit, 0
    try:
        with torch.no_grad():
            return model(*inputs, **kwargs)
    finally:
        model.cache.limit = limit


def agree(model, x, task):
    torch.testing.assert_close(model(x, task), uncached(model, x, task), rtol=1e-5, atol=1e-6)


def bytes_of_task(model):
    return sum(w.nbytes for w, s in zip(model.weights(), model.layout.segments, strict=True) if s.selected)
