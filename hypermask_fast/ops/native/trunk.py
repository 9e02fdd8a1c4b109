"""The hypernetwork's trunk on a few rows, forward and backward in a call each; for the CPU."""

import torch

from . import operator

trunk = operator(
    "trunk",
    lambda embeddings, layers: [
        weight.new_empty(len(embeddings), weight.shape[0]) for weight in layers[::2] for _ in ("outputs", "slopes")
    ],
)

trunk_backward = operator(
    "trunk_backward", lambda grad, kept, embeddings, layers: [torch.empty_like(t) for t in (*embeddings, *layers)]
)
