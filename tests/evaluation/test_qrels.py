"""Retrieval tasks of mteb by name, with the scores of mteb."""

import random
import sys

import pytest

from keyword_models import keyword_model
from llamory.errors import LlamoryError
from llamory.evaluation.qrels import read_mteb


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The tasks that mteb knows, to which a test may add."""
    pytest.importorskip("mteb")
    known = dict(sys.modules["mteb.get_tasks"]._TASKS_REGISTRY)
    monkeypatch.setattr(sys.modules["mteb.get_tasks"], "_TASKS_REGISTRY", known)
    return known


@pytest.fixture
def task(registry: dict):
    """A small task, whose data is made up on the spot."""
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    registry["SmallRetrieval"] = MockRetrievalTask
    made = MockRetrievalTask()
    made.load_data()
    return made.dataset["default"]


@pytest.mark.slow
def test_a_task_is_what_mteb_loads(task) -> None:
    data = read_mteb("SmallRetrieval")
    expected = task["test"]
    assert (data.name, data.split) == ("SmallRetrieval", "test")
    assert dict(data.queries) == dict(zip(expected["queries"]["id"], expected["queries"]["text"], strict=True))
    assert data.qrels == expected["relevant_docs"]
    titles = (
        expected["corpus"]["title"] if "title" in expected["corpus"].column_names else [""] * len(expected["corpus"])
    )
    texts = [f"{title} {text}".strip() for title, text in zip(titles, expected["corpus"]["text"], strict=True)]
    assert list(data.read()) == list(zip(expected["corpus"]["id"], texts, strict=True))
    assert list(data.ids) == list(expected["corpus"]["id"])
    assert read_mteb("SmallRetrieval", "val").split == "val"
    with pytest.raises(LlamoryError, match="has no split 'train'; it has "):
        read_mteb("SmallRetrieval", "train")


def test_what_cannot_be_a_retrieval_task_is_one_sentence(registry: dict) -> None:
    with pytest.raises(LlamoryError, match=r"mteb has no such task \(did you mean NFCorpus\?\)"):
        read_mteb("NFCorpis")
    with pytest.raises(LlamoryError, match="is of the kind STS; name a retrieval task"):
        read_mteb("STS12")
    with pytest.raises(LlamoryError, match="data of the mteb task NFCorpus can't be loaded"):  # tests are offline
        read_mteb("NFCorpus")


def test_without_mteb_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(LlamoryError, match=r"There is no folder NFCorpus; .* pip install 'llamory\[mteb\]'"):
        read_mteb("NFCorpus")


def test_scores_are_mtebs_own(registry: dict) -> None:
    import mteb
    import torch
    from datasets import Dataset
    from mteb.mocks.mock_tasks.retrieval import MockRetrievalTask

    from llamory.evaluation.retrieval import score_queries, search_vectors, summarize

    words = "river stone bridge winter garden letter window market silver morning harbour candle forest".split()

    class Made(MockRetrievalTask):
        """Graded qrels of words drawn at random."""

        def load_data(self, *_: object, **__: object) -> None:
            chance = random.Random(0)
            documents = [
                {"id": f"d{i}", "title": chance.choice(words), "text": " ".join(chance.choices(words, k=5))}
                for i in range(120)
            ]
            queries = [{"id": f"q{i}", "text": " ".join(chance.choices(words, k=3))} for i in range(30)]
            relevant = {
                query["id"]: {entry["id"]: chance.randint(1, 2) for entry in chance.sample(documents, 3)}
                for query in queries
            }
            tables = {"corpus": Dataset.from_list(documents), "queries": Dataset.from_list(queries)}
            self.dataset = {"default": {"test": {**tables, "relevant_docs": relevant, "top_ranked": None}}}
            self.data_loaded = True

    model = keyword_model(words)
    torch.manual_seed(0)
    model[0].embedding.weight.data.normal_()  # so that no two texts tie
    registry["Made"] = Made
    result = mteb.evaluate(model, Made().filter_eval_splits(["test"]), cache=None, overwrite_strategy="always")
    (theirs,) = result.task_results[0].scores["test"]
    data = read_mteb("Made")
    ours = summarize(
        score_queries(data, search_vectors(data, model.encode_query, model.encode_document, model.similarity))
    )
    assert ours["nDCG@10"] == pytest.approx(theirs["ndcg_at_10"], abs=1e-5)  # mteb rounds it
    assert ours["MRR@10"] == pytest.approx(theirs["mrr_at_10"], abs=1e-5)
    assert ours["Recall@100"] == pytest.approx(theirs["recall_at_100"], abs=1e-5)
