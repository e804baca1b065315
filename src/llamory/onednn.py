"""Linear layers for inference in float32 on a CPU: oneDNN's kernels, with what follows the product in the same pass.

torch gives float32 products to MKL, which uses its slower kernels on processors that aren't Intel's; oneDNN, which
torch carries too, makes its kernels for the processor it finds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KERNEL = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(layer: Any, x: Tensor, *, silu: bool = False, add: Tensor | None = None) -> Tensor:
    """What a linear layer gives, then optionally SiLU of it, then optionally a sum.

    Args:
        layer: an `nn.Linear`, or any module that stands in its place (such as one with a LoRA adapter).
        x: (N, in).
        silu: whether to take SiLU of the product.
        add: (N, out) to add.

    Returns:
        (N, out); without a gradient where the fast kernel was used.
    """
    base = getattr(layer, "base_layer", None)
    if base is not None and _is_fast(base, x) and _is_plain(layer):
        y = linear(base, x, add=None if silu else add)
        for name in layer.active_adapters:
            low: Any = linear(layer.lora_A[name], x)
            y = torch.addmm(y, low, layer.lora_B[name].weight.T, alpha=layer.scaling[name])
        y = F.silu(y) if silu else y
        return y if add is None or not silu else y + add
    if _is_fast(layer, x):
        if add is not None and not silu:
            return _KERNEL.binary(x, add, layer.weight, layer.bias, "add")  # type: ignore[union-attr]
        y = _KERNEL(x, layer.weight, layer.bias, "swish" if silu else "none", [], "")  # type: ignore[misc]
    else:
        y = layer(x)
        y = F.silu(y) if silu else y
    return y if add is None else y + add


def gated(gate: Any, up: Any, x: Tensor) -> Tensor:
    """SiLU of one layer times another: (N, in) to (N, out)."""
    y = linear(gate, x, silu=True)
    if _is_fast(up, x) and y.dtype == x.dtype:
        return _KERNEL.binary(x, y, up.weight, up.bias, "mul")  # type: ignore[union-attr]
    return y * linear(up, x)


def _is_plain(layer: Any) -> bool:
    """Whether peft's layer adds products of low rank, and nothing else, to what the base layer gives."""
    names = getattr(layer, "active_adapters", ())
    return (
        not (layer.merged or layer.disable_adapters or layer.training)
        and all(name in getattr(layer, "lora_A", ()) for name in names)
        and not any(name in layer.lora_variant for name in names)
        and all(layer.lora_A[name].weight.dtype == torch.float32 and layer.lora_B[name].bias is None for name in names)
    )


def _is_fast(layer: nn.Module, x: Tensor) -> bool:
    return (
        _KERNEL is not None
        and type(layer) is nn.Linear
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
