"""LLARA on a GPU, which is pretended where there is none: losses and vectors are those of the CPU."""

import numpy as np
import pytest
import torch

from llamory.embedding.encoder import FlatEncoder
from llamory.embedding.pipeline import load_embedder
from pretend_device import can_pretend, pretended_cuda
from tiny_models import save_llara

TEXTS = ["", "x", "def f(x):\n    return x\n" * 3, "naïve 日本語 🦙", "two words", "two lines"]


@pytest.fixture
def gpu():
    if torch.cuda.is_available():
        yield "cuda:0"
    elif can_pretend():
        with torch.no_grad(), pretended_cuda():
            yield "cuda:0"
    else:
        pytest.skip("this torch has CUDA of its own but no GPU")


@pytest.mark.parametrize("packed", [False, True])
def test_losses(make_model, template, gpu, packed):
    passages = [list(range(20, 27)), [30, 31, 32], list(range(40, 60))]
    rows = [template.sequence(passage) for passage in passages]
    if packed:
        rows = [rows[0] + rows[1], rows[2]]
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, -len(row) :], mask[number, -len(row) :] = torch.tensor(row), 1
    summaries, predictions = torch.randint(3, 90, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.where((ids > 10) & (ids < 100), ids, -100)}
    batch |= {"output_summarize_ids": summaries, "output_predict_ids": predictions}
    model = make_model()
    wanted = model(**batch)
    found = model.to(gpu)(**{name: tensor.to(gpu) for name, tensor in batch.items()})
    assert found.loss.device == torch.device(gpu)
    torch.testing.assert_close(found.loss.cpu(), wanted.loss)


def test_vectors(gpu, tmp_path):
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    checkpoint = save_llara(
        tmp_path, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4, **shape
    )
    here, there = load_embedder(checkpoint, device="cpu"), load_embedder(checkpoint, device=gpu)
    for task, name in (("document", "encode_document"), ("query", "encode_query")):
        wanted = getattr(here, name)(TEXTS)
        np.testing.assert_allclose(getattr(there, name)(TEXTS), wanted, atol=1e-5)
        np.testing.assert_allclose(FlatEncoder.from_embedder(there).encode(TEXTS, task), wanted, atol=1e-5)
