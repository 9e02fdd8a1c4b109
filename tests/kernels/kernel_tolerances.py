"""How far a kernel may be from the float64 reference: largest error over the reference's largest magnitude."""

import torch

TOLERANCES = {
    torch.float32: 2e-6,  # sums of a few hundred products in another order; measured up to 7e-7
    torch.float16: 1.5e-3,  # one rounding of operands and result each; measured up to 1.0e-3
    torch.bfloat16: 1.2e-2,  # the same with 8 bits, on a GPU
}
