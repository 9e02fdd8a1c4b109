"""Valid arguments of every native op, by name."""

import torch

OFFSETS = [0, 12, 17, 18]


def arguments(grad=False):
    """Valid arguments of every op, by name."""
    weights = [torch.randn(3, 4).requires_grad_(grad), torch.randn(5).requires_grad_(grad)]
    logits, thresholds = torch.randn(18).requires_grad_(grad), torch.tensor([0.2, 0.4, 0.0])
    previous, norms = torch.randn(18), torch.rand(2)
    weight, bias = torch.randn(50, 6).requires_grad_(grad), torch.randn(50).requires_grad_(grad)
    hidden, targets = torch.randn(3, 1, 6).requires_grad_(grad), torch.randn(3, 50)
    state = [torch.rand(50, 6), torch.rand(50), torch.rand(50, 6), torch.rand(50, 6), torch.rand(50), torch.rand(50)]
    one = torch.tensor(1.0)
    plain = [w.detach() for w in weights]
    return {
        "mask_thresholds": (logits.detach(), OFFSETS, torch.tensor([1, 2, 0])),
        "semi_binary_mask": (logits, torch.tensor(0.3)),
        "semi_binary_mask_backward": (torch.randn(18), logits.detach(), torch.tensor(0.3)),
        "masked_weights": (weights, logits, thresholds, OFFSETS),
        "masked_weights_backward": (plain, plain, logits.detach(), thresholds, OFFSETS),
        "weight_drift": (weights, previous, OFFSETS, 1, logits, thresholds),
        "weight_drift_backward": (norms, norms, plain, previous, OFFSETS, 2, logits.detach(), thresholds),
        "masked_weights_drift": (weights, logits, thresholds, OFFSETS, previous, 1),
        "masked_weights_drift_backward": (
            *(plain, norms, norms, plain, logits.detach(), thresholds),
            *(OFFSETS, previous, 2),
        ),
        "output_drift": (hidden, weight, bias, targets),
        "output_drift_backward": (one, hidden.detach(), weight.detach(), bias.detach(), targets),
        "hypernet_logits": (hidden.detach()[0, 0], weight, bias),
        "hypernet_adam": (torch.randn(3, 6), torch.randn(50), targets[:2], one, *state, one, one, 0.9, 0.99, 1e-8),
    }


NAMES = sorted(arguments())
