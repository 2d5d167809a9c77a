"""A linear layer for searches in bfloat16 on a CPU: few rows meet the same weights step after step.

oneDNN multiplies blocks of its own layout. torch's linear layer brings the weights into it anew at every call, which
for 16 rows takes a third of the time; here it is done once, as torch's compiler does it for frozen models.
"""

import torch
from torch import Tensor, nn

ROWS = 16  # that the layout suits; others are served hardly slower


class PackedLinear(nn.Linear):
    """A linear layer with these weights, bfloat16 (C, H) and (C,), on a CPU; for inference."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = (nn.Parameter(own.detach(), requires_grad=False) for own in (weight, bias))
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)

    def forward(self, input: Tensor) -> Tensor:
        """bfloat16 (R, H) → (R, C)."""
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")
