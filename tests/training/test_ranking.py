"""A retriever's losses: beside their formulas, and with the gradient cache beside the whole batch in one piece."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

from llamory.embedding.pipeline import load_embedder
from llamory.training.distillation import ranking_loss
from llamory.training.pairs import Example, GroupDataset, Pairs
from llamory.training.retriever import _arguments, _collator, _model_source, _set_columns
from llamory.training.settings import RetrieverSettings

WORDS = "river stone bridge winter garden letter window market silver morning".split()
TEMPERATURE, TEACHER = 0.05, 3.0


@pytest.fixture
def setting(model_folder, tmp_path):
    def make(**changes):
        values = {"model": str(model_folder), "data": ["unused"], "output": str(tmp_path), "temperature": TEMPERATURE}
        return RetrieverSettings(**(values | {"teacher_temperature": TEACHER, "mini_batch": 2, "cpu": True} | changes))

    return make


@pytest.fixture
def embedder(setting, tmp_path):
    """In float64, so that nothing but a wrong formula makes a difference."""
    return load_embedder(_model_source(setting(), tmp_path, write=True), device="cpu").double()


@pytest.fixture
def batch(setting, embedder):
    """The model's inputs for five queries with three documents each, and a teacher's scores."""
    pairs = Pairs(
        Example(a, (f"{a} {b}",), (f"{b} {b} {b}", b), (2.0 + i,), (0.5 * i, -1.0))
        for i, (a, b) in enumerate(zip(WORDS[:5], WORDS[5:], strict=True))
    )
    arguments = _arguments(setting())
    _set_columns(arguments, embedder, 3)
    groups = GroupDataset(pairs, 3, seed=0, scored=True)
    made = _collator(embedder, setting(), arguments)([groups[i] for i in range(5)])
    columns = ["anchor", "positive", "negative_1", "negative_2"]
    features = [{k.removeprefix(f"{c}_"): v for k, v in made.items() if k.startswith(f"{c}_")} for c in columns]
    return features, made["label"].double()


def loss_and_gradients(embedder, settings, teacher, batch):
    features, scores = batch
    embedder.zero_grad()
    loss = ranking_loss(embedder, settings, teacher=teacher, gather_across_devices=False)(
        [dict(each) for each in features], scores
    )
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in embedder.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def expected(embedder, batch, teacher, sizes, weights):
    """The loss in plain tensors."""
    features, scores = batch
    vectors = [embedder(dict(each))["sentence_embedding"] for each in features]
    total = torch.zeros((), dtype=torch.float64)
    for size in sizes:
        query, *documents = [normalize(each[:, :size], dim=1) for each in vectors]
        own = torch.stack([cosine_similarity(query, each) for each in documents], 1)
        every = query @ torch.cat(documents).T / TEMPERATURE
        contrast = (every.logsumexp(1) - own[:, 0] / TEMPERATURE).mean()
        taught = scores / TEACHER
        if teacher == "kl":
            told = taught.softmax(1)
            distance = (told * (told.log() - (own / TEMPERATURE).log_softmax(1))).sum(1).mean()
        elif teacher == "margin_mse":
            distance = ((own[:, :1] - own[:, 1:]) - (taught[:, :1] - taught[:, 1:])).square().mean()
        else:
            distance = torch.zeros((), dtype=torch.float64)
        total = total + (weights[0] * contrast if teacher != "off" else contrast) + weights[1] * distance
    return total


@pytest.mark.parametrize("sizes", [[], [8, 16]], ids=["whole", "matryoshka"])
@pytest.mark.parametrize("teacher", ["off", "kl", "margin_mse"])
def test_the_cache_changes_neither_loss_nor_gradients_and_both_are_the_formula(
    setting, embedder, batch, teacher, sizes
):
    common = {"matryoshka": sizes, "contrastive_weight": 0.7, "distill_weight": 1.3}
    cached = loss_and_gradients(embedder, setting(cache=True, **common), teacher, batch)
    whole = loss_and_gradients(embedder, setting(cache=False, **common), teacher, batch)
    embedder.zero_grad()
    formula = expected(embedder, batch, teacher, [*sizes, 32], (0.7, 1.3))
    formula.backward()
    plain = {name: p.grad for name, p in embedder.named_parameters() if p.grad is not None}
    assert cached[1].keys() == whole[1].keys() == plain.keys()
    for loss, gradients in (cached, whole):
        torch.testing.assert_close(loss, formula.detach(), atol=1e-8, rtol=1e-8)
        for name in plain:
            torch.testing.assert_close(gradients[name], plain[name], atol=1e-8, rtol=1e-8)


def test_a_teacher_can_be_alone(setting, embedder, batch):
    loss, _ = loss_and_gradients(embedder, setting(contrastive_weight=0.0), "kl", batch)
    torch.testing.assert_close(loss, expected(embedder, batch, "kl", [32], (0.0, 1.0)).detach(), atol=1e-8, rtol=1e-8)
