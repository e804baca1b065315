"""FoT batches: rows of consecutive chunks of documents, and resuming."""

import json
import tempfile
from itertools import count, cycle, islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.training.corpus import DocumentStream, Source
from llamory.training.fot.batches import FotBatches

BOS, EOS, FIRST = 1, 2, 3


def word_tokenizer(size=3000):
    """Words w3, w4, ... are the tokens 3, 4, ...; it adds bos itself if asked for special tokens."""
    words = {"<unk>": 0, "<s>": BOS, "</s>": EOS, **{f"w{i}": i for i in range(FIRST, size)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


TOKENIZER = word_tokenizer()


def make_documents(lengths, first=FIRST):
    """Documents of these lengths; no token occurs twice."""
    tokens = count(first)
    return [list(islice(tokens, length)) for length in lengths]


def write(path, documents):
    """JSON lines of documents given as tokens."""
    lines = [json.dumps({"text": " ".join(f"w{token}" for token in document)}) for document in documents]
    path.write_text("\n".join(lines) + "\n")
    return path


def make_stream(*paths, seed=0, **changes):
    return DocumentStream([Source(list(paths))], TOKENIZER, seed=seed, **changes)


def make_batches(stream, **changes):
    return FotBatches(stream, **{"row_length": 6, "batch_size": 4, "bos_token_id": BOS, "eos_token_id": EOS, **changes})


def through_json(state):
    return json.loads(json.dumps(state))


# ---- batches -------------------------------------------------------------------------------------------------------


def plain_batches(documents, places, packing, row_length, bos, number):
    """The same batches from lists: each place takes the next document when it has too few tokens left."""
    endless = enumerate(cycle(documents))
    waiting = [[] for _ in range(places)]
    length = packing * row_length
    for _ in range(number):
        rows, labels, owners = [], [], []
        for place in range(places):
            while len(waiting[place]) < length + 1:
                running, document = next(endless)
                waiting[place] += [(token, running) for token in [*([] if bos is None else [bos]), *document, EOS]]
            for start in range(0, length, row_length):
                row = waiting[place][start : start + row_length + 1]
                rows.append([token for token, _ in row[:-1]])
                labels.append([token for token, _ in row[1:]])
                owners.append(row[0][1])
            waiting[place] = waiting[place][length:]
        yield {"input_ids": rows, "shift_labels": labels, "documents": owners}


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 60), min_size=1, max_size=8),
        "places": st.integers(1, 3),
        "packing": st.integers(1, 3),
        "row_length": st.integers(2, 9),
        "bos": st.sampled_from([BOS, None]),
    }
)


def batches_of(path, shape, **changes):
    return make_batches(
        make_stream(path, **changes),
        row_length=shape["row_length"],
        batch_size=shape["places"] * shape["packing"],
        dataset_packing=shape["packing"],
        bos_token_id=shape["bos"],
    )


@settings(max_examples=60, deadline=None)
@given(shape=shapes)
def test_batches_are_consecutive_chunks_as_in_plain_lists(shape):
    documents = make_documents(shape["lengths"])
    with tempfile.TemporaryDirectory() as folder:
        batches = batches_of(write(Path(folder) / "a.jsonl", documents), shape, shuffle_buffer=0)
        expected = plain_batches(
            documents, shape["places"], shape["packing"], shape["row_length"], shape["bos"], number=12
        )
        for wanted, batch in zip(expected, batches, strict=False):
            assert {name: tensor.tolist() for name, tensor in batch.items()} == wanted
            assert all(tensor.dtype == torch.long for tensor in batch.values())


@settings(max_examples=40, deadline=None)
@given(shape=shapes, cut=st.integers(0, 15), seed=st.integers(0, 99), shuffle_buffer=st.integers(0, 5))
def test_batches_go_on_to_the_same_bits(shape, cut, seed, shuffle_buffer):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.jsonl", make_documents(shape["lengths"]))
        whole, broken, resumed = (batches_of(path, shape, seed=seed, shuffle_buffer=shuffle_buffer) for _ in range(3))
        list(islice(whole, cut)), list(islice(broken, cut))
        next(resumed)
        resumed.load_state_dict(through_json(broken.state_dict()))
        for wanted, batch in zip(islice(whole, 10), resumed, strict=False):
            assert wanted.keys() == batch.keys()
            assert all(torch.equal(wanted[name], batch[name]) for name in wanted)


def test_a_long_document_fills_its_place_while_others_come_and_go(tmp_path):
    long, *short = make_documents([40, 3, 3, 3, 3, 3, 3, 3, 3])
    path = write(tmp_path / "a.jsonl", [long, *short])
    batches = make_batches(make_stream(path, shuffle_buffer=0), row_length=5, dataset_packing=2)
    first, second = next(batches), next(batches)
    assert torch.cat([first["input_ids"][:2], second["input_ids"][:2]]).flatten().tolist() == [BOS, *long[:19]]
    assert first["documents"].tolist() == [0, 0, 1, 2]
    assert second["documents"].tolist() == [0, 0, 3, 4]
    assert first["input_ids"][2:].flatten().tolist() == [BOS, *short[0], EOS, BOS, *short[1], EOS]
    assert first["shift_labels"][:, -1].tolist() == [long[4], long[9], BOS, BOS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "dataset_packing": 4}, "dataset_packing of 4 doesn't divide the batch of 6 rows"),
        ({"row_length": 1}, "at least 2 tokens, not 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"dataset_packing": 0}, "at least 1"),
        ({"eos_token_id": None}, "end-of-text"),
    ],
)
def test_batches_that_cannot_be(tmp_path, changes, message):
    stream = make_stream(write(tmp_path / "a.jsonl", make_documents([3])))
    with pytest.raises(LlamoryError, match=message):
        make_batches(stream, **changes)


def test_a_state_of_other_data_or_settings_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([3, 4]))
    state = through_json(make_batches(make_stream(path)).state_dict())
    make_batches(make_stream(path)).load_state_dict(state)
    with pytest.raises(LlamoryError, match="seed 0, not 1"):
        make_batches(make_stream(path, seed=1)).load_state_dict(state)
    with pytest.raises(LlamoryError, match="shards 1, not 2"):
        make_batches(make_stream(path, shards=2)).load_state_dict(state)
    with pytest.raises(LlamoryError, match="row_length 6, not 7"):
        make_batches(make_stream(path), row_length=7).load_state_dict(state)
    other = DocumentStream([Source(path)], word_tokenizer(2000), seed=0)
    with pytest.raises(LlamoryError, match="other files or another tokenizer"):
        make_batches(other).load_state_dict(state)
    write(path, make_documents([3, 5]))
    with pytest.raises(LlamoryError, match="other files or another tokenizer"):
        make_batches(make_stream(path)).load_state_dict(state)
