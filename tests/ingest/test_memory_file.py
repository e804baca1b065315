"""A memory file belongs to the model and the settings that made it."""

import pytest

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank
from small_texts import SETTINGS


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
    with pytest.raises(LlamoryError, match="context is 2048"):
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
