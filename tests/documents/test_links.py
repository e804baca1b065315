"""Every command that reads folders skips links that lead out of them, and says so (for index: tests/library)."""

import json
import logging
from pathlib import Path

import pytest

from llamory.documents import read_documents
from llamory.documents.scan import LINK_OUTSIDE
from llamory.evaluation.datasets.functions import function_pairs, origin_of_folder
from llamory.evaluation.datasets.sections import section_pairs
from llamory.ingest.documents import load_documents
from llamory.llara import LlaraTemplate
from llamory.llara.data import load_examples
from llamory.models.base import load_tokenizer
from llamory.training.corpus import DocumentStream, make_sources
from llamory.training.instruct.dataset import load_instructions
from llamory.training.pairs import load_pairs

SECRET = "The safe opens with 4417."
LONG = " Bees make honey in a hive, day after day, and the rain falls in the hills of the north" * 2


def write(folder: Path, text: str) -> None:
    """One document of every kind that a command reads."""
    folder.mkdir()
    (folder / f"{folder.name}.md").write_text(f"# About the {folder.name} keys\n\n{text}{LONG}.")
    (folder / f"{folder.name}.py").write_text(
        f'def {folder.name}():\n    """Returns it. {text}{LONG}."""\n    one = 1\n    return one + 1\n'
    )
    line = {"query": "q?", "pos": text, "question": "q?", "response": text, "text": text}
    (folder / f"{folder.name}.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture
def folder(tmp_path):
    """A folder of documents with links to others outside of it."""
    write(tmp_path / "inside", "Bees make honey.")
    write(tmp_path / "outside", SECRET)
    for path in (tmp_path / "outside").iterdir():
        (tmp_path / "inside" / f"todo{path.suffix}").symlink_to(f"../outside/{path.name}")
    return tmp_path / "inside"


@pytest.fixture
def tokenizer(model_folder):
    tokenizer = load_tokenizer(model_folder)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def read_fot(folder, tokenizer):
    stream = iter(DocumentStream(make_sources([folder]), tokenizer, seed=0))
    return " ".join(tokenizer.decode(next(stream)[0]) for _ in range(8))


def read_llara(folder, tokenizer):
    template = LlaraTemplate.from_tokenizer(tokenizer)
    rows = load_examples([folder], tokenizer, template, max_length=128, streaming=True)
    return " ".join(tokenizer.decode(row["input_ids"]) for row in rows)


def read_instruct(folder, tokenizer):
    return " ".join(tokenizer.decode(row["input_ids"]) for row in load_instructions([folder], tokenizer))


COMMANDS = {
    "read": lambda folder, tokenizer: " ".join(
        tokenizer.decode(each.ids) for each in load_documents([folder], tokenizer)
    ),
    "train llara": read_llara,
    "train fot": read_fot,
    "train instruct": read_instruct,
    "train retriever": lambda folder, tokenizer: " ".join(load_pairs([folder]).documents),
    "dataset sections": lambda folder, tokenizer: " ".join(pair.text for pair in section_pairs([folder])),
    "dataset functions": lambda folder, tokenizer: " ".join(
        f"{pair.query} {pair.text}" for pair in function_pairs([origin_of_folder(folder)])
    ),
    "eval": lambda folder, tokenizer: " ".join(document.text for document in read_documents([folder])),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_nothing_outside_of_the_folder(folder, tokenizer, caplog, command):
    with caplog.at_level(logging.WARNING):
        text = COMMANDS[command](folder, tokenizer)
    assert "honey" in text or "hive" in text
    assert "4417" not in text
    assert f"Skipped {folder / 'todo.md'}: {LINK_OUTSIDE}." in caplog.text
