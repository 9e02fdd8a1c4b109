"""The operators that this package calls in the extension, as csrc declares them.

A library that declares one otherwise, or lacks it, was built from other sources and is not used. Who changes a schema
in csrc changes it here; a test compares this list with what was built.
"""

# One operator begins in each line that is not indented.
_SCHEMAS = """
checksum(Tensor bytes) -> Tensor
chunk_masked_linear(Tensor x, Tensor weight, Tensor hidden, Tensor output_weight, Tensor output_bias, int start,
    Tensor threshold, Tensor? bias) -> Tensor
count_steps(Tensor(a!)[] steps) -> ()
cpu_isa(int isa) -> int
factored_adam(Tensor factors, Tensor scales, Tensor hidden, Tensor(a!) weight, Tensor(b!) weight_m, Tensor(c!)
    weight_v, Tensor step, Tensor lr, float beta1, float beta2, float eps, float weight_decay=0., bool
    decoupled=False, bool maximize=False, int first_row=0) -> ()
fused_adam(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] steps,
    float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, bool maximize) -> ()
hidden_gradient(Tensor factors, Tensor scales, Tensor weight) -> (Tensor hidden_grad, Tensor bias_grad)
hypernet_adam(Tensor hidden, Tensor grad_logits, Tensor targets, Tensor drift_weight, Tensor(a!) weight,
    Tensor(b!) bias, Tensor(c!) weight_m, Tensor(d!) weight_v, Tensor(e!) bias_m, Tensor(f!) bias_v, Tensor step,
    Tensor lr, float beta1, float beta2, float eps, float weight_decay=0., bool decoupled=False, bool
    maximize=False, int first_row=0) -> (Tensor hidden_grad, Tensor drift)
hypernet_logits(Tensor hidden, Tensor weight, Tensor bias) -> Tensor
mask_overlap(Tensor logits, Tensor thresholds, int[] offsets) -> Tensor
mask_thresholds(Tensor logits, int[] offsets, Tensor ranks) -> Tensor
masked_linear(Tensor x, Tensor weight, Tensor logits, Tensor threshold, Tensor? bias) -> Tensor
masked_weight(Tensor weight, Tensor logits, Tensor threshold) -> Tensor
masked_weight_backward(Tensor grad, Tensor weight, Tensor logits, Tensor threshold) -> (Tensor, Tensor)
masked_weights(Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets) -> Tensor[]
masked_weights_backward(Tensor[] grads, Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets) ->
    (Tensor[], Tensor)
masked_weights_drift(Tensor[] weights, Tensor logits, Tensor thresholds, int[] offsets, Tensor previous, int norm)
    -> (Tensor[], Tensor)
masked_weights_drift_backward(Tensor[] grads, Tensor grad, Tensor norms, Tensor[] weights, Tensor logits, Tensor
    thresholds, int[] offsets, Tensor previous, int norm) -> (Tensor[], Tensor)
output_drift(Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> Tensor
output_drift_backward(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> (Tensor, Tensor,
    Tensor)
output_residuals(Tensor hidden, Tensor weight, Tensor bias, Tensor targets) -> (Tensor residuals, Tensor drift)
semi_binary_mask(Tensor logits, Tensor threshold) -> Tensor
semi_binary_mask_backward(Tensor grad, Tensor logits, Tensor threshold) -> Tensor
trunk(Tensor[] embeddings, Tensor[] layers) -> Tensor[]
trunk_backward(Tensor grad, Tensor[] kept, Tensor[] embeddings, Tensor[] layers) -> Tensor[]
weight_drift(Tensor[] weights, Tensor previous, int[] offsets, int norm, Tensor? logits, Tensor? thresholds) ->
    Tensor
weight_drift_backward(Tensor grad, Tensor norms, Tensor[] weights, Tensor previous, int[] offsets, int norm,
    Tensor? logits, Tensor? thresholds) -> (Tensor[], Tensor)
"""

SCHEMAS = tuple(_SCHEMAS.replace("\n    ", " ").split("\n")[1:-1])
