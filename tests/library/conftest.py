"""Libraries of an embedding model whose vectors can be checked by hand."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from keyword_models import keyword_model
from tiny_models import save_llama

KNOWN_WORDS = ["cat", "dog", "river", "money"]


@pytest.fixture
def embedder() -> SentenceTransformer:
    return keyword_model(KNOWN_WORDS)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "keywords"
    keyword_model(KNOWN_WORDS).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reversed"
    keyword_model([*KNOWN_WORDS[::-1], "tree"]).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory) -> Path:
    """A tiny LLaMA with strong weights, so that what it reads makes a difference; memory in both layers."""
    folder = tmp_path_factory.mktemp("models") / "reader"
    save_llama(folder, ["cat dog river money the a sat with met ran home"], initializer_range=0.3)
    return folder


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Collects every passage that is embedded."""
    texts: list[str] = []
    encode_document = SentenceTransformer.encode_document

    def spy(self, inputs, **kwargs):
        texts.extend(inputs)
        return encode_document(self, inputs, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode_document", spy)
    return texts


@pytest.fixture
def docs(tmp_path) -> Path:
    """Three files: one about cats, one about dogs, one about both."""
    folder = tmp_path / "docs"
    (folder / "pets").mkdir(parents=True)
    (folder / "cats.txt").write_text("the cat sat with a cat\n")
    (folder / "pets" / "both.txt").write_text("a cat met a dog\n")
    (folder / "pets" / "dogs.md").write_text("# About dogs\n\nthe dog ran home\n")
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine's two cores; whoever asks for a cluster uses what it finds."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
