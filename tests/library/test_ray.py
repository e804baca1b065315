"""On Ray, indexing gives the same library and encoding the same memories as in one process, whatever dies meanwhile."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from sentence_transformers.base.modules.normalize import Normalize

from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.library import ray as ray_module
from llamory.library.indexer import Batch
from llamory.library.ray import (
    BatchMessage,
    Embedder,
    FileReader,
    MemoryWriter,
    MemoryWriters,
    RayIndexer,
    _Deduplicator,
)
from llamory.memory import MemoryBank

FILES, DOCUMENTS = 24, 3


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(FILES):
        texts = [f"the cat {i} met dog number {j} at the river" for j in range(DOCUMENTS)]
        if i % 2:
            (folder / f"{i}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
        else:
            (folder / f"{i}.md").write_text("\n\n".join(f"# Part {j}\n\n{text}" for j, text in enumerate(texts)))
    return folder


def contents(library: Library) -> dict:
    """Everything in a library's table that indexing decides, and what it noted of the files."""
    table = library._store._table.to_arrow().to_pylist()
    rows = {(row["source"], row["position"]): row for row in table}
    assert len(rows) == len(table), "a passage is there twice"
    vectors = {row_key: row.pop("vector") for row_key, row in rows.items()}
    return {"rows": rows, "vectors": vectors, "file_index": library._store.file_index()}


def assert_same(one: Library, other: Library) -> None:
    a, b = contents(one), contents(other)
    assert a["rows"] == b["rows"] and a["file_index"] == b["file_index"]
    for row_key, vector in a["vectors"].items():
        np.testing.assert_allclose(vector, b["vectors"][row_key], atol=1e-6)


@pytest.fixture
def expected(tmp_path, folder, embedder) -> Library:
    library = Library(tmp_path / "expected", embedder)
    library.add(folder, progress=False)
    return library


def slow(embedder):
    """The same vectors, but each batch takes a while; a class of this function travels to the workers as it is."""

    class Slow(Normalize):
        def forward(self, features):
            time.sleep(0.1)
            return features

    return type(embedder)(modules=[*embedder, Slow()], device="cpu")


@pytest.mark.slow
def test_a_worker_killed_midway_loses_and_doubles_nothing(cluster, tmp_path, folder, expected, embedder, monkeypatch):
    monkeypatch.setattr(ray_module, "FILES_PER_CALL", 2)
    killed: list[str] = []
    run = RayIndexer.run

    def run_and_kill(self, tasks):
        for count, batch in enumerate(run(self, tasks)):
            if count == 2:
                killed.extend(kill_one("Embedder") + kill_one("FileReader"))
            yield batch

    monkeypatch.setattr(RayIndexer, "run", run_and_kill)
    library = Library(tmp_path / "library", slow(embedder))
    report = library.add(folder, engine="ray", progress=False)
    assert any("Embedder" in name for name in killed)
    assert (report.added, report.passages) == (len(expected._store.documents()), len(expected))
    assert_same(library, expected)


def kill_one(actor: str) -> list[str]:
    """Kill one process of an actor class; its name, or nothing if there is none."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(process.cmdline())
            if actor in name:
                process.kill()
                return [name]
    return []


@pytest.mark.slow
def test_what_is_unchanged_changed_gone_and_broken_is_told_as_without_ray(cluster, tmp_path, folder, embedder):
    reports = []
    for engine in ("local", "ray"):
        library = Library(tmp_path / engine, embedder)
        first = library.add(folder, engine=engine, progress=False)
        (folder / "0.md").write_text("# Part 0\n\nmoney in the river")
        (folder / "2.md").rename(tmp_path / "2.md")
        (folder / "broken.jsonl").write_text('{"text": "a cat"}\n{"text"')
        reports.append((first, library.add(folder, engine=engine, progress=False), contents(library)))
        (folder / "0.md").write_text("\n\n".join(f"# Part {j}\n\nthe cat 0 met dog {j}" for j in range(DOCUMENTS)))
        (tmp_path / "2.md").rename(folder / "2.md")
        (folder / "broken.jsonl").unlink()
    local, on_ray = reports
    for before, after in zip(local[:2], on_ray[:2], strict=True):
        assert before.failed == after.failed
        for number in ("added", "unchanged", "updated", "removed"):
            assert getattr(before, number) == getattr(after, number), number
    assert local[1].failed and local[1].removed and local[1].updated
    assert on_ray[2]["file_index"].keys() == local[2]["file_index"].keys()
    assert on_ray[2]["rows"].keys() == local[2]["rows"].keys()


@pytest.mark.slow
def test_a_run_whose_own_process_is_killed_is_finished_by_the_next(tmp_path, folder, model_folder, expected):
    script = (
        "import sys, time\n"
        "from llamory.library import Library\n"
        "from llamory.library import ray as ray_module\n"
        "from llamory.library.indexer import Update\n"
        "ray_module.FILES_PER_CALL, write_batch = 2, Update.write_batch\n"
        "def slowly(self, batch):\n"
        "    write_batch(self, batch); print('written', flush=True); time.sleep(0.3)\n"
        "Update.write_batch = slowly\n"
        "Library(sys.argv[1], sys.argv[2]).add(sys.argv[3], engine='ray', progress=False)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "library"), str(model_folder), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "written\n"
        started = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    library = Library(tmp_path / "library", model_folder)
    assert 0 < len(library) < len(expected)
    library.add(folder, progress=False)
    assert_same(library, expected)
    _, alive = psutil.wait_procs(started, timeout=15)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        # Ray's two agents look a few times before they believe that all is over; nothing else may stay.
        assert "Agent" in process.name()
        process.kill()
    assert len(started) - len(alive) > len(alive)


@pytest.mark.slow
def test_a_worker_that_finds_another_model_says_so(cluster, tmp_path, folder, model_folder, other_model_folder):
    library = Library(tmp_path / "library", model_folder)
    library.add(folder / "0.md", progress=False)
    moved = Library(tmp_path / "library", model_folder)
    moved._embedder()
    moved._model = str(other_model_folder)
    with pytest.raises(LlamoryError, match="finds another model"):
        moved.add(folder, engine="ray", progress=False)


# ---- without a cluster -----------------------------------------------------------------------------------------------


def test_an_address_without_a_cluster_is_told_at_once(tmp_path, folder, embedder):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(LlamoryError, match=f"no Ray cluster at {re.escape(address)}"):
            Library(tmp_path / "library", embedder).add(folder, engine="ray", ray_address=address, progress=False)


def test_messages_that_arrive_twice_count_once():
    row = {"source": "a", "file": "a"}
    vectors = np.ones((1, 2), dtype=np.float32)
    messages = [
        BatchMessage(Batch([row], vectors, ["b"]), {"a": "first"}, embedded=1),
        BatchMessage(
            Batch([row, {"source": "c", "file": "a"}], np.ones((2, 2)), ["b"], {"a": "content"}), {"a": "second"}
        ),
        BatchMessage(Batch(completed_files={"d": "content"}), {"d": "third"}),
    ]
    deduplicator = _Deduplicator()
    batches = [deduplicator.deduplicate(message) for message in messages]
    assert [[row["source"] for row in batch.rows] for batch in batches] == [["a"], ["c"], []]
    assert [None if batch.vectors is None else len(batch.vectors) for batch in batches] == [1, 1, None]
    assert [batch.unchanged for batch in batches] == [["b"], [], []]
    assert batches[1].completed_files == {"a": ""}, "a file put together from two readings isn't noted as read"
    assert batches[2].completed_files == {"d": "content"}


def test_an_embedder_uses_what_the_library_holds(tmp_path, folder, model_folder, expected, embedder):
    import pickle

    from llamory.embedding.encoder import chunk_tokenizer, fingerprint
    from llamory.library.indexer import ChunkingConfig, FileTask

    config = ChunkingConfig(chunk_size=256)
    reader = FileReader(config, chunk_tokenizer(embedder))
    actor = Embedder(config, str(model_folder), fingerprint(embedder), str(tmp_path / "expected"), "cpu")
    new = tmp_path / "new.jsonl"
    new.write_text('{"text": "the cat 1 met dog number 0 at the river"}\n{"text": "money"}\n')
    rows = list(reader({"tasks": [pickle.dumps([FileTask(str(new))])]}))
    (output,) = actor(rows[0])
    message = pickle.loads(output["message"][0])
    assert len(message.batch.rows) == 2 and message.embedded == 1
    np.testing.assert_allclose(
        message.batch.vectors, embedder.encode_document([row["text"] for row in message.batch.rows]), atol=1e-6
    )


# ---- memories --------------------------------------------------------------------------------------------------------

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
        assert_right([(TEXTS[index], ray_module._from_bytes(data))], [TEXTS[index]])


def test_what_cant_be_read_comes_back_as_a_sentence():
    _, memories, error = MemoryWriter(make_readers()).read(0, ["fine", "broken"])
    assert memories == [] and error == "broken can't be read."


@pytest.mark.slow
def test_a_writer_killed_midway_loses_and_doubles_nothing(cluster, monkeypatch):
    monkeypatch.setattr(ray_module, "DOCUMENTS_PER_CALL", 2)
    token_counts: dict[str, int] = {}

    def advance(source, tokens):
        token_counts[source] = token_counts.get(source, 0) + tokens

    memories, killed = [], False
    with MemoryWriters(make_readers(seconds=0.2)) as writers:
        for text, bank in writers.read(TEXTS, advance):
            memories.append((text, bank))
            killed = killed or bool(kill_one("MemoryWriter"))
        # The writers stay for the next documents.
        assert_right(list(writers.read(TEXTS[:1])), TEXTS[:1])
        with pytest.raises(LlamoryError, match="broken can't be read"):
            list(writers.read(["broken"]))
    assert killed
    assert_right(memories, TEXTS)
    assert token_counts == {text: len(text) for text in TEXTS}
