"""The published implementation's numbers hold (tests/golden/README.md says how they were made)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from llamory.llara import PreLlamaModel

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("llara_*.json"))


def load(path, implementation):
    golden = json.loads(path.read_text())
    model = PreLlamaModel(LlamaConfig(**golden["config"], attn_implementation=implementation))
    state = model.state_dict()
    assert sorted(state) == golden["state_dict_keys_sorted"]
    for i, key in enumerate(sorted(state)):
        values = np.random.RandomState(golden["weights_seed"] + i).standard_normal(state[key].shape)
        values = values.astype(np.float32) * np.float32(0.4)
        state[key] = torch.from_numpy(values + 1 if key.endswith("norm.weight") else values)
    model.load_state_dict(state)
    return golden, model


def run(golden, model, **changes):
    keys = ("input_ids", "attention_mask", "labels", "output_summarize_ids", "output_predict_ids")
    inputs = {key: None if golden[key] is None else torch.tensor(golden[key]) for key in keys}
    return model(**(inputs | changes))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_losses_logits_and_gradients_are_the_published_ones(path, implementation):
    golden, model = load(path, implementation)
    output = run(golden, model.train(), skip_logits=False)
    assert output.loss.item() == pytest.approx(golden["loss"], abs=1e-4)
    assert output.ar_loss.item() == pytest.approx(golden["ar_loss"], abs=1e-4)
    for head in ("summarize", "predict"):
        wanted, found = golden[f"bow_{head}_loss_alone"], getattr(output, f"bow_{head}_loss")
        assert found is None if wanted is None else found.item() == pytest.approx(wanted, abs=1e-4)

    places = torch.tensor(golden["input_ids"])
    slots = model.template.summarize_slot_ids + model.template.predict_slot_ids
    at_slots = output.logits[torch.isin(places, torch.tensor(slots))].view(len(places), len(slots), -1)
    wanted = torch.tensor(golden["logits_at_special_positions"])
    torch.testing.assert_close(at_slots[..., golden["logits_vocab_ids"]], wanted, atol=1e-4, rtol=0)
    first = (torch.tensor(golden["labels"]) != -100).int().argmax(1)
    at_first = output.logits[torch.arange(len(first)), first][..., golden["logits_vocab_ids"]]
    torch.testing.assert_close(at_first, torch.tensor(golden["logits_at_first_passage_token"]), atol=1e-4, rtol=0)

    output.loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(golden["grad_norms"], rel=1e-3)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_one_loss_alone_is_the_published_one(path):
    golden, model = load(path, "sdpa")
    only = {"labels": None, "output_summarize_ids": None, "output_predict_ids": None}
    alone = run(golden, model, **(only | {"labels": torch.tensor(golden["labels"])}))
    assert alone.loss.item() == pytest.approx(golden["ar_loss"], abs=1e-4)
    for head in ("summarize", "predict"):
        if golden[f"output_{head}_ids"] is not None:
            alone = run(golden, model, **(only | {f"output_{head}_ids": torch.tensor(golden[f"output_{head}_ids"])}))
            assert alone.loss.item() == pytest.approx(golden[f"bow_{head}_loss_alone"], abs=1e-4)
