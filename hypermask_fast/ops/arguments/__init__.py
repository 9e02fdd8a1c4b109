"""What the ops' arguments must be: one rule per op, judged once for every backend, in the same words.

A rule takes all of its op's arguments by position and raises `InputError` before anything is computed or changed. It
says what the definition in `reference` needs. What a single backend can't serve is for that backend's offer to say.
A rule stands in the file of its op's family, as in `reference`, and beside it what a backend's operators take besides,
which can be called directly.
"""

from .checks import gradient as gradient
from .checks import one_device as one_device
from .checks import tensors as tensors
from .hypernetwork import chunked_output_drift as chunked_output_drift
from .hypernetwork import factored_adam as factored_adam
from .hypernetwork import hidden_gradient as hidden_gradient
from .hypernetwork import hypernet_adam as hypernet_adam
from .hypernetwork import hypernet_logits as hypernet_logits
from .hypernetwork import output_drift as output_drift
from .hypernetwork import output_residuals as output_residuals
from .layers import Size as Size
from .layers import chunk_logits as chunk_logits
from .layers import chunk_masked_conv2d as chunk_masked_conv2d
from .layers import chunk_masked_linear as chunk_masked_linear
from .layers import entropy_select as entropy_select
from .layers import known_tasks as known_tasks
from .layers import masked_conv2d as masked_conv2d
from .layers import masked_linear as masked_linear
from .layers import pair as pair
from .layers import sorted_rows as sorted_rows
from .layers import task_batched_linear as task_batched_linear
from .masks import kept_ranks as kept_ranks
from .masks import mask_overlap as mask_overlap
from .masks import mask_thresholds as mask_thresholds
from .masks import masked_weights as masked_weights
from .masks import masked_weights_drift as masked_weights_drift
from .masks import masked_weights_gradients as masked_weights_gradients
from .masks import semi_binary_mask as semi_binary_mask
from .masks import weight_drift as weight_drift
from .masks import weight_drift_gradient as weight_drift_gradient
