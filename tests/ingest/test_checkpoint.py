"""A stopped run resumes from its checkpoint."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.ingest import checkpoint as checkpoint_module
from llamory.ingest import encode
from llamory.ingest.checkpoint import IngestCheckpoint
from llamory.ingest.documents import TokenizedDocument
from llamory.ingest.memory_file import MemoryFileInfo, checkpoint_path
from llamory.longllama.causal import encode_windows
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from small_texts import CONTEXT, SETTINGS, sentence


def tensors(path: Path, dtype: str = "float32") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bank = MemoryBank.load(path, dtype=dtype)
    return {name: (bank.keys(1, name), bank.values(1, name)) for name in bank.segments}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


def interrupt(*_) -> None:
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
from llamory.ingest import checkpoint, encode
from llamory.common.progress import ProgressBar

checkpoint.SAVE_INTERVAL_SECONDS = checkpoint._SAVE_TIME_RATIO = 0
windows = 0

def advance(self, tokens, **_):
    global windows
    windows += 1
    if windows == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

ProgressBar.advance = advance
encode.read_documents_into(
    sys.argv[1], sys.argv[2], model=sys.argv[3], mem_layers=[1], context_length=16, mem_dtype="float32"
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_as_if_in_one_go(read, memory_file, texts, model_folder) -> None:
    arguments = [str(memory_file), str(texts), str(model_folder), "8"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not memory_file.exists()
    with pytest.raises(LlamoryError, match=r"isn't finished.*book\.partial"):
        MemoryFileInfo(memory_file)
    report = read(texts)
    assert report.resumed > CONTEXT
    assert report.tokens + report.resumed == report.memory_tokens
    resumed = tensors(memory_file)
    assert sorted(path.name for path in memory_file.parent.iterdir()) == [".book.lock", "book", "texts"]
    memory_file.unlink()
    assert read(texts).resumed == 0
    assert same(resumed, tensors(memory_file))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("windows", [1, 3, 4, 6, 9, 12])
def test_a_run_stopped_anywhere_loses_no_whole_window(read, memory_file, texts, monkeypatch, dtype, windows) -> None:
    (texts / "f.txt").write_text(sentence(3, 150))
    monkeypatch.setattr(encode, "MAX_BATCH_ROWS", 1)  # so that a window is a step
    read(texts, mem_dtype=dtype)
    wanted = tensors(memory_file, dtype)
    memory_file.unlink()
    seen: list[int] = []

    def stop(model, rows, banks, start=0):
        encoding, encoded = encode_windows(model, rows, banks, start), start
        while encoded < len(rows[0]):
            if len(seen) == windows:
                # Within a window: its first layers have it, the others don't.
                banks[0].append(1, torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
                raise KeyboardInterrupt
            seen.append(next(encoding) - encoded)
            encoded += seen[-1]
            yield encoded

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_windows", stop)
        with pytest.raises(KeyboardInterrupt):
            read(texts, mem_dtype=dtype)
    assert not memory_file.exists()
    report = read(texts, mem_dtype=dtype)
    assert report.resumed == sum(seen)
    assert same(tensors(memory_file, dtype), wanted)


def test_a_stopped_run_leaves_the_memory_and_other_documents_alone(read, memory_file, texts, monkeypatch) -> None:
    read(texts / "a.txt")
    before = memory_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(IngestCheckpoint, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(texts / "c.txt", texts / "more" / "d.txt")
    assert memory_file.read_bytes() == before
    # c is finished but not asked for now: it waits beside.
    assert read(texts / "b.txt").resumed == 0
    assert MemoryBank.load(memory_file).segments == ("a.txt", "b.txt")
    assert MemoryBank.load(checkpoint_path(memory_file)).segments == (str(texts / "c.txt"),)
    report = read(texts / "c.txt")
    assert (report.tokens, report.added) == (0, 1)
    assert report.resumed == MemoryBank.load(memory_file).length(segment="c.txt")
    assert not checkpoint_path(memory_file).exists()


def test_a_document_that_changed_since_the_stop_is_read_anew(read, memory_file, texts, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(IngestCheckpoint, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(texts)
    (texts / "c.txt").write_text("market morning")
    changed = read(texts).resumed
    found = tensors(memory_file)
    assert changed == sum(found[f"texts/{name}.txt"][0].shape[1] for name in ("a", "more/e"))
    memory_file.unlink()
    read(texts)
    for name, parts in tensors(memory_file).items():
        torch.testing.assert_close(found[name], parts, atol=1e-5, rtol=1e-5)


def test_saving_takes_a_small_part_of_the_time(monkeypatch, tmp_path, model_folder) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kept = IngestCheckpoint(tmp_path / "p", load_long_model(model_folder, **SETTINGS), "model")
    kept._saved_at, kept._save_seconds = 0.0, 2.0
    monkeypatch.setattr(kept, "save", lambda: saved.append(now[0]))
    for now[0] in (10.0, 39.0, 41.0):
        kept.save_if_due()
    assert saved == [41.0]
    kept.start(TokenizedDocument("/a.txt", "A", "digest", torch.zeros(2 * CONTEXT)))
    for now[0] in (50.0, 61.0):
        kept.save_if_due(mid_document=True)
    assert saved == [41.0, 61.0]


def test_an_unfinished_document_goes_on_with_offloaded_weights(tmp_path, model_folder) -> None:
    from accelerate import cpu_offload

    model = load_long_model(model_folder, **SETTINGS)
    ids = torch.arange(3, 3 + 3 * CONTEXT, dtype=torch.int32) % 90
    document = TokenizedDocument("/a.txt", "A", "digest", ids, file="/a.txt", label="a.txt")
    unfinished_bank = model.read(ids[:CONTEXT], segment="/a.txt")
    read = unfinished_bank.fork()
    unfinished_bank.set_metadata("/a.txt", **document.metadata("model", CONTEXT), unfinished=True)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    kept = IngestCheckpoint(tmp_path / "p", model, "model", unfinished_bank)
    bank = kept.start(document)
    for layer in bank.layers:
        assert bank.length(layer) == CONTEXT
        assert torch.equal(bank.keys(layer), read.keys(layer))
        assert torch.equal(bank.values(layer), read.values(layer))


def test_a_partial_file_of_another_model_is_refused(read, memory_file, texts, other_model) -> None:
    read(texts / "a.txt", model=other_model)
    memory_file.rename(checkpoint_path(memory_file))
    with pytest.raises(LlamoryError, match=r"book\.partial was made by another model.*remove that file"):
        read(texts / "a.txt")
    assert not memory_file.exists()


def test_a_damaged_partial_file_is_refused(read, memory_file, texts) -> None:
    read(texts)
    checkpoint_file = checkpoint_path(memory_file)
    memory_file.rename(checkpoint_file)
    checkpoint_file.write_bytes(checkpoint_file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(LlamoryError, match=r"damaged.*or remove that file to begin anew"):
        read(texts)


def test_a_failed_save_of_an_interrupted_run_is_reported(read, memory_file, texts, monkeypatch, caplog) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IngestCheckpoint, "start", interrupt)
    monkeypatch.setattr(IngestCheckpoint, "save_if_due", lambda *_, **__: None)
    monkeypatch.setattr(MemoryBank, "save", full)
    with pytest.raises(KeyboardInterrupt):
        read(texts)
    assert f"{checkpoint_path(memory_file)} can't be saved: [Errno 28]" in caplog.text


def test_int8_blocks_are_copied_as_they_are(tmp_path, model_folder, monkeypatch) -> None:
    model = load_long_model(model_folder, **SETTINGS | {"mem_dtype": "int8"})
    ids = torch.arange(3, 3 + 3 * CONTEXT + 5, dtype=torch.int32) % 90
    short, long = (
        TokenizedDocument(f"/{n}.txt", n, n, ids[:tokens], file=f"/{n}.txt")
        for n, tokens in (("a", 9), ("b", len(ids)))
    )
    banks = [model.read(document.ids) for document in (short, long)]
    written = [
        (span.block.keys[:, span.start : span.stop], span.block.key_scales[:, span.start : span.stop])
        for bank in banks
        for span in bank.spans(1)
    ]
    for method in ("keys", "values"):
        monkeypatch.setattr(MemoryBank, method, lambda *_, **__: pytest.fail("the memory was converted to float32"))
    saved = IngestCheckpoint(tmp_path / "p", model, "model")
    saved.add(short, banks[0])
    saved._current = (long, banks[1])
    saved.save()
    resumed = IngestCheckpoint(tmp_path / "p", model, "model", MemoryBank.load(tmp_path / "p"))
    copies = [resumed.bank.spans(1)[0], resumed.start(long).spans(1)[0]]
    for (keys, scales), span in zip(written, copies, strict=True):
        assert torch.equal(span.block.keys[:, span.start : span.stop], keys[:, : len(span)])
        assert torch.equal(span.block.key_scales[:, span.start : span.stop], scales[:, : len(span)])
    assert [len(span) for span in copies] == [9, 3 * CONTEXT]
