"""Small documents, and reading them into a memory with the tiny model."""

import shutil
from pathlib import Path

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.ingest.encode import ReadReport, read_documents_into
from small_texts import SETTINGS, sentence


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three documents of a window at most and two longer ones."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number, (name, words) in enumerate({"a": 3, "b": 40, "c": 5, "more/d": 90, "more/e": 2}.items()):
        (folder / f"{name}.txt").write_text(sentence(number, words))
    return folder


@pytest.fixture
def read(model_folder: Path, tmp_path: Path):
    """Reads into one memory file with the tiny model."""

    def run(*paths: Path, **settings) -> ReadReport:
        settings = {"model": model_folder, "progress": False} | SETTINGS | settings
        return read_documents_into(tmp_path / "book", paths, **settings)

    return run


@pytest.fixture
def memory_file(tmp_path: Path) -> Path:
    return tmp_path / "book"


@pytest.fixture
def refused(read, memory_file, texts):
    """The sentence with which reading is refused; the memory must stay as it is."""
    read(texts / "a.txt")
    before = {path: path.read_bytes() for path in memory_file.parent.iterdir() if path.is_file()}

    def run(*paths, **settings) -> str:
        with pytest.raises(LlamoryError) as error:
            read(*paths, **settings)
        assert {path: path.read_bytes() for path in memory_file.parent.iterdir() if path.is_file()} == before
        message = str(error.value)
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def other_model(tmp_path_factory, model_folder) -> Path:
    """The tiny model with other weights."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.weight)
    model.save_pretrained(folder)
    return folder
