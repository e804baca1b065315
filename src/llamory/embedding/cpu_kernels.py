"""Linear layers for float32 inference on a CPU by oneDNN, with activation or sum fused into the product.

torch computes float32 products with MKL, which is slow on processors other than Intel's. For oneDNN's kernels it has
only a private operator, `_KERNEL`; where that fails, the functions compute the same with `torch.nn.functional`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _find_kernel() -> Any:
    """The private operator; None if this torch lacks it or it computes something else."""
    try:
        if not torch.backends.mkldnn.is_available():
            return None
        kernel = torch.ops.mkldnn._linear_pointwise
        x = torch.tensor([[1.0, 2.0]])
        with torch.inference_mode():
            works = [
                torch.equal(kernel(x, x, None, "none", [], ""), torch.tensor([[5.0]])),
                torch.equal(kernel.binary(x, torch.tensor([[2.0]]), x, None, "add"), torch.tensor([[7.0]])),
                torch.equal(kernel.binary(x, torch.tensor([[2.0]]), x, None, "mul"), torch.tensor([[10.0]])),
                bool(kernel(x, x, None, "swish", [], "").sub(F.silu(torch.tensor(5.0))).abs() < 1e-4),
            ]
        return kernel if all(works) else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None


_KERNEL = _find_kernel()


def linear(layer: Any, x: Tensor, *, silu: bool = False, add: Tensor | None = None) -> Tensor:
    """A linear layer's output (N, out), with SiLU if asked for, plus `add`; without a gradient if the kernel is used.

    `layer` is an `nn.Linear`, or a module that replaces one (such as a layer with a LoRA adapter); `x` is (N, in).
    """
    if _can_use_kernel(layer, x):
        if add is not None and not silu:
            return _KERNEL.binary(x, add, layer.weight, layer.bias, "add")  # type: ignore[union-attr]
        y = _KERNEL(x, layer.weight, layer.bias, "swish" if silu else "none", [], "")  # type: ignore[misc]
    else:
        y = _low_rank(layer, x) if _is_low_rank(layer) else layer(x)
        y = F.silu(y) if silu else y
    return y if add is None else y + add


def swiglu(gate: Any, up: Any, x: Tensor) -> Tensor:
    """SiLU of one layer times another: (N, in) to (N, out)."""
    y = linear(gate, x, silu=True)
    if _can_use_kernel(up, x) and y.dtype == x.dtype:
        return _KERNEL.binary(x, y, up.weight, up.bias, "mul")  # type: ignore[union-attr]
    return y * linear(up, x)


def _low_rank(layer: Any, x: Tensor) -> Tensor:
    """The output of a LoRA layer of peft: its base layer's output plus low-rank products."""
    y = linear(layer.base_layer, x)
    for name in layer.active_adapters:
        y = y + linear(layer.lora_B[name], linear(layer.lora_A[name], x)) * layer.scaling[name]
    return y


def _is_low_rank(layer: Any) -> bool:
    """Whether a layer is a plain LoRA layer of peft in evaluation mode."""
    if not hasattr(layer, "lora_A") or layer.merged or layer.disable_adapters or layer.training:
        return False
    return all(name in layer.lora_A and name not in layer.lora_variant for name in layer.active_adapters)


def _can_use_kernel(layer: nn.Module, x: Tensor) -> bool:
    if _KERNEL is None or type(layer) is not nn.Linear or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x.device.type == "cpu" and x.dtype == layer.weight.dtype == torch.float32 and x.numel() > 0
