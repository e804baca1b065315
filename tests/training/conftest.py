"""Settings of a training run that takes a second."""

import pytest

from llamory.llara import LlaraTemplate
from llamory.training.settings import LlaraSettings, RetrieverSettings
from toy_pairs import write_pairs


@pytest.fixture
def settings(model_folder, documents, tmp_path):
    """Settings of a run that takes a second."""

    def make(**changes):
        values = {
            "model": str(model_folder),
            "data": [str(documents)],
            "output": str(tmp_path / "run"),
            "batch_size": 8,
            "steps": 6,
            "learning_rate": 3e-3,
            "max_length": 150,
            "chunk_size": 24,
            "log_every": 1,
            "save_every": 3,
            "cpu": True,
            "quiet": True,
            "export": False,
        }
        return LlaraSettings(**(values | changes))

    return make


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 64)


@pytest.fixture(scope="session")
def llara_folder(model_folder, tmp_path_factory):
    """The tiny LLaMA with a template, as LLARA pretraining leaves one."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llara")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    LlaraTemplate.from_tokenizer(tokenizer).prepare_model(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def retriever_settings(llara_folder, pairs, tmp_path):
    """Settings of a retriever's run that takes a second."""

    def make(**changes):
        values = {
            "model": str(llara_folder),
            "data": [str(pairs)],
            "output": str(tmp_path / "run"),
            "batch_size": 8,
            "mini_batch": 8,
            "group_size": 2,
            "steps": 4,
            "learning_rate": 3e-3,
            "max_passage_length": 200,
            "log_every": 1,
            "save_every": 2,
            "cpu": True,
            "quiet": True,
        }
        return RetrieverSettings(**(values | changes))

    return make
