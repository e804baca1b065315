"""Memory files keep their settings, and only new and changed documents are encoded again."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.ingest.documents import TokenizedDocument
from llamory.ingest.memory_file import diff_documents
from llamory.memory import MemoryBank
from small_texts import SETTINGS, sentence


def test_settings_and_model_of_a_memory_need_not_be_said_again(read, memory_file, texts) -> None:
    read(texts / "a.txt")
    nothing = dict.fromkeys(("model", *SETTINGS))
    assert read(texts / "b.txt", **nothing).added == 1
    assert MemoryBank.load(memory_file).layers == (1,)


def test_a_memory_of_another_model_is_refused(refused, texts, other_model, model_folder) -> None:
    message = refused(texts, model=other_model)
    assert "made by another model" in message
    assert str(other_model) in message
    assert str(model_folder) in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"mem_layers": [0]}, "memory layers 1, not 0"),
        ({"context_length": 8}, "a context of 16, not 8"),
        ({"mem_dtype": "int8"}, "the dtype float32, not int8"),
    ],
)
def test_other_settings_than_the_memorys_are_refused(refused, texts, setting, words) -> None:
    assert words in refused(texts, **setting)


def test_layers_that_do_not_exist_and_contexts_too_long_are_refused(read, memory_file, texts) -> None:
    with pytest.raises(LlamoryError, match="layer 7, but the model has 2 layers"):
        read(texts, mem_layers=[0, 7])
    with pytest.raises(LlamoryError, match="model's context, 2048"):
        read(texts, context_length=4096)
    with pytest.raises(LlamoryError, match="no memory layers"):
        read(texts, mem_layers=[])
    assert {path.name for path in memory_file.parent.iterdir()} == {".book.lock", "texts"}


def test_a_damaged_memory_is_refused_and_stays(read, memory_file, texts) -> None:
    read(texts)
    for damaged in (memory_file.read_bytes()[:-100], memory_file.read_bytes()[:-4] + b"abcd", b"river"):
        memory_file.write_bytes(damaged)
        with pytest.raises(LlamoryError, match="book"):
            read(texts)
        assert memory_file.read_bytes() == damaged


def test_a_folder_in_place_of_the_memory_is_refused(read, memory_file, texts) -> None:
    memory_file.mkdir()
    with pytest.raises(LlamoryError, match="is a folder"):
        read(texts)


# ---- changes ---------------------------------------------------------------------------------------------------------


def tensors(path: Path, dtype: str = "float32") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bank = MemoryBank.load(path, dtype=dtype)
    return {name: (bank.keys(1, name), bank.values(1, name)) for name in bank.segments}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


def test_documents_of_the_same_name_get_different_ones(read, memory_file, tmp_path) -> None:
    for folder in ("one/x", "two/x", "three"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(f"river {folder}")
    read(tmp_path / "one/x", tmp_path / "two/x", tmp_path / "three/a.txt")
    assert MemoryBank.load(memory_file).segments == ("x/a.txt", "two/x/a.txt", "a.txt")


def test_only_what_is_new_or_changed_is_read_again(read, memory_file, texts) -> None:
    read(texts)
    before = tensors(memory_file)
    (texts / "b.txt").write_text(sentence(7, 20))
    (texts / "g.txt").write_text("silver letter")
    report = read(texts)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 1, 4, 0)
    after = tensors(memory_file)
    assert list(after) == [*before, "texts/g.txt"]
    assert report.tokens == after["texts/b.txt"][0].shape[1] + after["texts/g.txt"][0].shape[1]
    assert not same({"": before.pop("texts/b.txt")}, {"": after.pop("texts/b.txt")})
    del after["texts/g.txt"]
    assert same(before, after)


def test_nothing_new_leaves_the_file_alone(read, memory_file, texts) -> None:
    read(texts)
    before = memory_file.stat()
    report = read(texts / "b.txt", texts)
    assert (report.unchanged, report.tokens, report.tokens_per_second) == (5, 0, 0)
    assert (memory_file.stat().st_ino, memory_file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_not_named_stays(read, memory_file, texts) -> None:
    read(texts / "a.txt")
    report = read(texts / "b.txt")
    assert MemoryBank.load(memory_file).segments == ("a.txt", "b.txt")
    assert (report.added, report.documents) == (1, 2)


def test_lines_that_moved_are_known_again(read, memory_file, tmp_path) -> None:
    lines = [json.dumps({"text": sentence(i, 6 + i)}) for i in range(4)]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines))
    read(file)
    before = tensors(memory_file)
    new = json.dumps({"text": "winter window"})
    file.write_text("\n".join([new, lines[3], lines[0], lines[1]]))
    report = read(file)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 0, 3, 1)
    after = tensors(memory_file)
    moved = {"lines.jsonl:2": "lines.jsonl:4", "lines.jsonl:3": "lines.jsonl:1", "lines.jsonl:4": "lines.jsonl:2"}
    assert set(after) == {*moved, "lines.jsonl:1"}
    assert same({name: after[name] for name in moved}, {name: before[old] for name, old in moved.items()})
    assert MemoryBank.load(memory_file).metadata("lines.jsonl:2")["source"] == f"{file}:2"


def test_a_folder_that_was_moved_is_known_again(read, memory_file, texts, tmp_path) -> None:
    read(texts)
    before = tensors(memory_file)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(texts, tmp_path / "elsewhere" / "texts")
    report = read(tmp_path / "elsewhere" / "texts")
    assert (report.unchanged, report.added, report.tokens) == (5, 0, 0)
    assert same(before, tensors(memory_file))
    source = MemoryBank.load(memory_file).metadata("texts/a.txt")["source"]
    assert source == str(tmp_path / "elsewhere" / "texts" / "a.txt")


def test_a_plan_is_applied_in_one_step(monkeypatch) -> None:
    def fail(*_):
        pytest.fail("segments were changed one by one, which takes quadratic time")

    def document(source: str, digest: str) -> TokenizedDocument:
        return TokenizedDocument(source, "", digest, torch.zeros(1), file="/f", label=source[1:])

    bank, encoded = (MemoryBank([1], 1, 2, dtype="float32") for _ in range(2))
    for number, source in enumerate(("/f:1", "/f:2", "/f:3", "/f:4")):
        bank.append(1, torch.full((1, 1, 2), float(number)), torch.zeros(1, 1, 2), segment=source[1:])
        bank.set_metadata(source[1:], source=source, file="/f", digest=str(number))
    for source in ("/f:3", "/f:4"):
        encoded.append(1, torch.full((1, 1, 2), 9.0), torch.zeros(1, 1, 2), segment=source)
    # The first two lines swap places, the third one has changed, the fourth one too.
    documents = [document("/f:1", "1"), document("/f:2", "0"), document("/f:3", "new"), document("/f:4", "newer")]
    segments = [{"name": name, "metadata": bank.metadata(name)} for name in bank.segments]
    plan = diff_documents(segments, documents)
    for method in ("drop", "rename"):
        monkeypatch.setattr(MemoryBank, method, fail)
    changed = plan.apply(bank, encoded, lambda each: {"source": each.source, "digest": each.digest})
    assert plan.moved == {"f:1": "f:2", "f:2": "f:1"}
    assert changed.segments == ("f:2", "f:1", "f:3", "f:4")
    assert changed.keys(1)[0, :, 0].tolist() == [0, 1, 9, 9]
    assert bank.segments == ("f:1", "f:2", "f:3", "f:4")
