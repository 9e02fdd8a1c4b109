"""Mask one layer by hand: logits, thresholds, a mask, the masked product, and its gradient.

    python examples/mask_one_layer.py

A hypernetwork would generate the logits. Here they are a tensor of our own, so that every step of the method can be
seen. Needs nothing but hypermask_fast.
"""

import torch

import hypermask_fast as hmf
from hypermask_fast import functional as ops


def main() -> None:
    torch.manual_seed(0)
    layer = hmf.MaskedLinear(64, 32)  # an nn.Linear that also takes a mask
    x = torch.randn(8, 64)
    logits = torch.randn(32, 64, requires_grad=True)  # one logit per weight

    # The mask drops the `sparsity` percent of the entries with the smallest |logit|. Where that cut lies is a selection
    # by rank. It is done per segment: here the only one is entries 0 to 2048 of the flat logits.
    sparsity = 30
    entries = layer.weight.numel()
    ranks = torch.tensor([ops.kept_rank(sparsity, entries)])
    threshold = ops.mask_thresholds(logits.detach().flatten(), [0, entries], ranks)[0]

    # Semi-binary: dropped entries are 0, kept entries are |tanh(logit)|, a number between 0 and 1.
    mask = ops.semi_binary_mask(logits, threshold)
    dropped = 100 * (mask == 0).float().mean().item()
    print(f"threshold on |logit|: {threshold:.4f}")
    print(f"dropped weights: {dropped:.1f} % ({sparsity} % were asked for)")

    # Three ways to the same output: by hand, by the op that does both at once, and by the layer itself.
    by_hand = x @ (layer.weight * mask).t() + layer.bias
    by_op = ops.masked_linear(x, layer.weight, logits, threshold, layer.bias)
    by_layer = layer(x, hmf.LayerMask(logits, threshold))
    difference = max((by_hand - other).abs().max().item() for other in (by_op, by_layer))
    print(f"largest difference between the three outputs: {difference:.1e}")

    # Weights and logits both learn. A dropped entry has no gradient, so it stays where it is until the threshold moves.
    by_layer.square().sum().backward()
    learning = 100 * (logits.grad != 0).float().mean().item()
    print(f"logits with a gradient: {learning:.1f} %")
    print(hmf.explain("masked_linear", x, layer.weight, logits, threshold, layer.bias))


if __name__ == "__main__":
    main()
