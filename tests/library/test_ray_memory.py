"""Memories written by workers are those that one process writes, whatever dies meanwhile."""

import contextlib
import time

import psutil
import pytest
import torch

from llamory.errors import LlamoryError
from llamory.library import ray_memory
from llamory.library.ray_memory import MemoryWriter, MemoryWriters
from llamory.memory import MemoryBank

TEXTS = [f"a document of {'many ' * i}words" for i in range(12)]


def make_readers(seconds=0.0):
    """A maker of readers that is pickled as it is: one token per letter, its key made of the letter, in any order."""

    class Letters:
        def read(self, documents, advance):
            for document in sorted(documents, key=len, reverse=True):
                if "broken" in document:
                    raise LlamoryError(f"{document} can't be read.")
                time.sleep(seconds)
                letters = torch.tensor([float(ord(letter)) for letter in document])
                bank = MemoryBank([1, 2], 2, 4, dtype="float32", fingerprint="letters")
                for layer in (1, 2):
                    keys = letters[None, :, None].expand(2, -1, 4) * layer
                    bank.append(layer, keys, -keys, "document")
                bank.set_metadata("document", source=document)
                advance(document, len(document) // 2)
                advance(document, len(document) - len(document) // 2)
                yield document, bank

    return Letters


def assert_right(memories, texts):
    assert sorted(text for text, _ in memories) == sorted(texts)
    for text, bank in memories:
        ((_, expected),) = make_readers()().read([text], lambda *_: None)
        assert bank.segments == ("document",) and bank.fingerprint == expected.fingerprint
        assert bank.metadata("document") == expected.metadata("document")
        for layer in (1, 2):
            assert torch.equal(bank.keys(layer), expected.keys(layer))
            assert torch.equal(bank.values(layer), expected.values(layer))


def test_a_writer_gives_the_files_of_its_readers_memories():
    number, memories, error = MemoryWriter(make_readers()).read(7, TEXTS[:3])
    assert (number, error) == (7, "") and sorted(index for index, _, _ in memories) == [0, 1, 2]
    for index, progress_events, data in memories:
        assert {source for source, _ in progress_events} == {TEXTS[index]} and sum(
            n for _, n in progress_events
        ) == len(TEXTS[index])
        assert_right([(TEXTS[index], ray_memory._from_bytes(data))], [TEXTS[index]])


def test_what_cant_be_read_comes_back_as_a_sentence():
    _, memories, error = MemoryWriter(make_readers()).read(0, ["fine", "broken"])
    assert memories == [] and error == "broken can't be read."


# ---- with Ray --------------------------------------------------------------------------------------------------------


def test_a_writer_killed_midway_loses_and_doubles_nothing(cluster, monkeypatch):
    monkeypatch.setattr(ray_memory, "DOCUMENTS_PER_CALL", 2)
    token_counts: dict[str, int] = {}

    def advance(source, tokens):
        token_counts[source] = token_counts.get(source, 0) + tokens

    memories, killed = [], False
    with MemoryWriters(make_readers(seconds=0.2)) as writers:
        for text, bank in writers.read(TEXTS, advance):
            memories.append((text, bank))
            killed = killed or kill_one("MemoryWriter")
        # The writers stay for the next documents.
        assert_right(list(writers.read(TEXTS[:1])), TEXTS[:1])
        with pytest.raises(LlamoryError, match="broken can't be read"):
            list(writers.read(["broken"]))
    assert killed
    assert_right(memories, TEXTS)
    assert token_counts == {text: len(text) for text in TEXTS}


def kill_one(actor: str) -> bool:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if actor in " ".join(process.cmdline()):
                process.kill()
                return True
    return False
