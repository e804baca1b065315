"""Linear layers with oneDNN's kernels give torch's results, and torch's own way serves where they can't."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llamory.embedding import cpu_kernels


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return nn.Linear(6, 10), nn.Linear(6, 10, bias=False), torch.randn(5, 6), torch.randn(5, 10)


@pytest.mark.parametrize("kernel", [cpu_kernels._KERNEL, None], ids=["kernel", "torch"])
def test_results_are_those_of_torch(layers, kernel, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_KERNEL", kernel)
    first, second, x, other = layers
    with torch.inference_mode():
        for layer in (first, second):
            expected = F.linear(x, layer.weight, layer.bias)
            torch.testing.assert_close(cpu_kernels.linear(layer, x), expected)
            torch.testing.assert_close(cpu_kernels.linear(layer, x, silu=True), F.silu(expected))
            torch.testing.assert_close(cpu_kernels.linear(layer, x, add=other), expected + other)
            torch.testing.assert_close(cpu_kernels.linear(layer, x, silu=True, add=other), F.silu(expected) + other)
        torch.testing.assert_close(cpu_kernels.swiglu(first, second, x), F.silu(first(x)) * second(x))


def test_inputs_are_left_as_they_were(layers):
    first, second, x, other = layers
    copies = x.clone(), other.clone()
    with torch.inference_mode():
        cpu_kernels.linear(first, x, add=other)
        cpu_kernels.swiglu(first, second, x)
    assert torch.equal(x, copies[0]) and torch.equal(other, copies[1])


def test_gradients_flow_where_they_are_asked_for(layers):
    first, second, x, other = layers
    cpu_kernels.linear(second, cpu_kernels.swiglu(first, second, x)[:, :6], add=other).sum().backward()
    assert first.weight.grad is not None and first.weight.grad.abs().sum() > 0


def test_a_module_in_place_of_a_layer_is_called(layers):
    first, second, x, _ = layers
    doubled = nn.Sequential(first, nn.Hardtanh())
    with torch.inference_mode():
        torch.testing.assert_close(cpu_kernels.linear(doubled, x), doubled(x))
        torch.testing.assert_close(cpu_kernels.swiglu(doubled, second, x), F.silu(doubled(x)) * second(x))


@pytest.mark.parametrize("kernel", [cpu_kernels._KERNEL, None], ids=["kernel", "torch"])
def test_a_layer_with_matrices_of_low_rank_beside_it(layers, kernel, monkeypatch):
    from peft import LoraConfig, inject_adapter_in_model

    first, _, x, other = layers
    model = nn.ModuleDict({"q": first, "k": nn.Linear(6, 10)})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6, target_modules=["q"], init_lora_weights=False), model)
    adapted = model.eval()["q"]
    monkeypatch.setattr(cpu_kernels, "_KERNEL", kernel)
    down, up = adapted.lora_A["default"].weight, adapted.lora_B["default"].weight
    with torch.inference_mode():
        expected = F.linear(x, first.weight + 3 * up @ down, first.bias)
        torch.testing.assert_close(cpu_kernels.linear(adapted, x), expected)
        torch.testing.assert_close(cpu_kernels.linear(adapted, x, silu=True, add=other), F.silu(expected) + other)
        torch.testing.assert_close(cpu_kernels.swiglu(adapted, model["k"], x), F.silu(expected) * model["k"](x))
        torch.testing.assert_close(cpu_kernels.swiglu(model["k"], adapted, x), F.silu(model["k"](x)) * expected)
        adapted.enable_adapters(False)
        torch.testing.assert_close(cpu_kernels.linear(adapted, x), F.linear(x, first.weight, first.bias))


def test_other_types_and_autocast_take_torchs_way(layers):
    first, second, x, _ = layers
    with torch.inference_mode():
        assert cpu_kernels.linear(first.double(), x.double()).dtype == torch.float64
        first.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert cpu_kernels.swiglu(first, second, x).dtype == torch.bfloat16
        assert cpu_kernels.linear(first, x[:0]).shape == (0, 10)


def test_without_the_private_operator_torch_computes(monkeypatch):
    assert cpu_kernels._find_kernel() is not None or not torch.backends.mkldnn.is_available()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert cpu_kernels._find_kernel() is None


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_an_operator_that_changed_is_not_used(monkeypatch, error):
    def changed(*_):
        raise error

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=changed))
    assert cpu_kernels._find_kernel() is None
