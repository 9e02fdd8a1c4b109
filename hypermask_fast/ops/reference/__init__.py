"""Every op of the method in plain PyTorch: its definition, and the oracle of every test.

Short and readable before fast. All functions take float32 or float64 (and what PyTorch promotes to them), are
differentiable by autograd where a gradient is meant to flow, and never modify their arguments.

Symbols: a mask logits, m mask, W target weight, N generated entries, S segments (one per masked tensor), T tasks,
H width of the hypernetwork's last hidden layer. "Flat" means the space of N entries in the order of `MaskLayout`;
`offsets` are the S + 1 segment borders in it, so segment s is entries offsets[s] to offsets[s + 1].

Source of the method: HyperMask, arXiv 2310.00113.

Each family has a file, as in `arguments`; `ops.stepping` has the definitions of those that step Adam.
"""

from ..stepping import factored_adam as factored_adam
from ..stepping import hypernet_adam as hypernet_adam
from .hypernetwork import chunk_logits as chunk_logits
from .hypernetwork import chunked_output_drift as chunked_output_drift
from .hypernetwork import hidden_gradient as hidden_gradient
from .hypernetwork import hypernet_logits as hypernet_logits
from .hypernetwork import output_drift as output_drift
from .hypernetwork import output_residuals as output_residuals
from .layers import chunk_masked_conv2d as chunk_masked_conv2d
from .layers import chunk_masked_linear as chunk_masked_linear
from .layers import entropy_select as entropy_select
from .layers import masked_conv2d as masked_conv2d
from .layers import masked_linear as masked_linear
from .layers import task_batched_linear as task_batched_linear
from .masks import kept_rank as kept_rank
from .masks import mask_overlap as mask_overlap
from .masks import mask_thresholds as mask_thresholds
from .masks import masked_weights as masked_weights
from .masks import masked_weights_drift as masked_weights_drift
from .masks import semi_binary_mask as semi_binary_mask
from .masks import weight_drift as weight_drift
