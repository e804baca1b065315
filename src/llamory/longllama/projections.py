"""The projections that memory may have for itself, beside a layer's own."""

from __future__ import annotations

from torch import nn
from transformers import initialization as init

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class MemoryProjection(nn.Linear):
    """A projection for memory, which starts as the layer's own.

    Args:
        base: the layer's.
        bias: whether it has a bias, too.
    """

    def __init__(self, base: nn.Linear, bias: bool):
        super().__init__(base.in_features, base.out_features, bias, base.weight.device, base.weight.dtype)
        self._base = (base,)  # in a tuple, as it isn't a part of this one
        self.init_from_base()

    def init_from_base(self) -> None:
        """Take the weights of the layer's own, unless these were loaded."""
        for name, parameter in self.named_parameters():
            init.copy_(parameter, getattr(self._base[0], name))
