"""The document stream: epochs, shuffling, proportions, shards, and resuming."""

import json
import re
import tempfile
from itertools import count, islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.training.corpus import DocumentStream, Source, make_sources
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


def take(stream, number):
    return [tokens for tokens, _, _ in islice(stream, number)]


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.fixture
def three_files(tmp_path):
    """A folder of three files with twenty documents each, and all the documents in order."""
    documents = make_documents([1 + i % 7 for i in range(60)])
    for i in range(3):
        write(tmp_path / f"{i}.jsonl", documents[20 * i : 20 * (i + 1)])
    return tmp_path, documents


# ---- the stream ----------------------------------------------------------------------------------------------------


def test_each_epoch_has_every_document_once_in_another_order(three_files):
    folder, documents = three_files
    stream = make_stream(folder, shuffle_buffer=8)
    epochs = [take(stream, 60) for _ in range(3)]
    assert all(sorted(epoch) == documents for epoch in epochs)
    orders = [documents, *epochs, take(make_stream(folder, shuffle_buffer=8, seed=1), 60)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    assert take(make_stream(folder, shuffle_buffer=8), 120) == epochs[0] + epochs[1]
    # Files are permuted too: over some seeds each of them comes first.
    firsts = {take(make_stream(folder, shuffle_buffer=1, seed=seed), 1)[0][0] for seed in range(12)}
    assert firsts == {documents[at][0] for at in (0, 20, 40)}


def test_without_a_buffer_documents_stay_in_order(three_files):
    folder, documents = three_files
    assert take(make_stream(folder, shuffle_buffer=0), 130) == [*documents, *documents, *documents[:10]]


def test_a_document_is_drawn_only_once_it_is_in_the_buffer(tmp_path):
    documents = make_documents([1] * 100)
    given_out = take(make_stream(write(tmp_path / "a.jsonl", documents), shuffle_buffer=10), 100)
    places = [documents.index(document) for document in given_out]
    assert all(place < step + 10 for step, place in enumerate(places))
    assert max(place - step for step, place in enumerate(places)) > 5


def test_only_what_is_needed_is_read(tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([3] * 20))
    path.write_text(path.read_text() + "{broken\n")
    batches = make_batches(make_stream(path, shuffle_buffer=4), row_length=2, batch_size=1)
    for _ in range(6):
        next(batches)
    with pytest.raises(LlamoryError, match=r"a\.jsonl:21"):
        list(islice(batches, 100))


def test_short_documents_are_passed_over(tmp_path):
    documents = make_documents([2, 5, 4, 9, 1, 5])
    stream = make_stream(write(tmp_path / "a.jsonl", documents), min_length=5, shuffle_buffer=0)
    assert take(stream, 4) == [documents[1], documents[3], documents[5], documents[1]]


@pytest.mark.parametrize("shuffle_buffer", [0, 5])
def test_processes_share_an_epoch(three_files, shuffle_buffer):
    folder, documents = three_files
    shards = [make_stream(folder, shuffle_buffer=shuffle_buffer, shard=shard, shards=7) for shard in range(7)]
    sizes = [9, 9, 9, 9, 8, 8, 8]
    for _ in range(2):
        parts = [take(stream, size) for stream, size in zip(shards, sizes, strict=True)]
        assert sorted(sum(parts, [])) == documents


def test_a_process_without_documents_takes_all_of_them(tmp_path):
    documents = make_documents([6, 6, 1, 6])
    path = write(tmp_path / "a.jsonl", documents)
    usable = [documents[0], documents[1], documents[3]]
    for shard, expected in enumerate([[documents[0]] * 3, [documents[1]] * 3, usable, [documents[3]] * 3, usable]):
        stream = make_stream(path, min_length=2, shuffle_buffer=3, shard=shard, shards=5)
        for _ in range(2):
            assert sorted(take(stream, 3)) == expected


def test_shares_of_tokens_tend_to_the_proportions(tmp_path):
    proportions, longest = [0.5, 0.3, 0.2], 40
    sources = [
        Source(write(tmp_path / f"{i}.jsonl", make_documents([size, 1 + size // 2] * 5)), proportions[i])
        for i, size in enumerate([5, longest, 17])
    ]
    stream = DocumentStream(sources, TOKENIZER, seed=0, shuffle_buffer=4)
    taken = [0, 0, 0]
    for tokens, source, _ in islice(stream, 600):
        taken[source] += len(tokens)
        assert stream.tokens_emitted == taken
        for share, tokens_of_source in zip(proportions, taken, strict=True):
            assert abs(tokens_of_source - share * sum(taken)) <= longest
    assert sum(taken) > 50 * longest


def test_documents_can_be_read_again_by_their_keys(three_files):
    folder, _ = three_files
    stream = make_stream(folder, shuffle_buffer=8)
    given_out = list(islice(stream, 70))
    assert stream.read((source, key) for _, source, key in given_out) == [tokens for tokens, _, _ in given_out]
    with pytest.raises(LlamoryError, match=r"1\.jsonl has no document 20 any more"):
        stream.read([(0, (1, 19)), (0, (1, 20))])


def test_a_state_has_no_text_and_is_small(tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([300] * 9))
    batches = make_batches(make_stream(path, shuffle_buffer=4))
    next(batches)
    state = json.dumps(batches.state_dict())
    assert not re.search(r"w\d", state)
    assert len(state) < 1500


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=9), min_size=1, max_size=3),
    cut=st.integers(0, 40),
    shuffle_buffer=st.integers(0, 6),
    shard=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_a_stream_goes_on_as_if_it_had_never_stopped(lengths, cut, shuffle_buffer, shard, seed):
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder) / f"{i}.jsonl", make_documents(own)) for i, own in enumerate(lengths)]

        def start():
            sources = [Source(paths[:1], 0.75), Source(paths[1:], 0.25)] if len(paths) > 1 else [Source(paths)]
            return DocumentStream(sources, TOKENIZER, seed=seed, shuffle_buffer=shuffle_buffer, shard=shard, shards=3)

        whole, broken, resumed = start(), start(), start()
        list(islice(whole, cut)), list(islice(broken, cut))
        next(resumed)
        resumed.load_state_dict(through_json(broken.state_dict()))
        assert list(islice(resumed, 30)) == list(islice(whole, 30))


# ---- bad input -----------------------------------------------------------------------------------------------------


def test_unusable_documents_are_told_before_training(tmp_path):
    path = write(tmp_path / "a.jsonl", make_documents([3, 7, 5]))
    make_stream(path, min_length=7)
    with pytest.raises(LlamoryError, match="at most 7 tokens, fewer than min_length 8"):
        make_stream(path, min_length=8)
    with pytest.raises(LlamoryError, match="There is no file or folder"):
        make_stream(tmp_path / "none.txt")
    with pytest.raises(LlamoryError, match="No documents were given"):
        DocumentStream([], TOKENIZER, seed=0)
    for changes in ({"shard": 2, "shards": 2}, {"min_length": -1}, {"shuffle_buffer": -1}):
        with pytest.raises(LlamoryError, match="must be"):
            make_stream(path, **changes)


def test_proportions_must_fit(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", make_documents([3])) for i in range(2)]
    assert [source.proportion for source in make_sources(paths)] == [1.0]
    DocumentStream(make_sources(paths, [0.3, 0.6995]), TOKENIZER, seed=0)
    for proportions, message in (
        ([0.5, 0.4], r"add up to 1; 0\.5, 0\.4 make 0\.9"),
        ([1.0, 0.0], "greater than 0"),
        ([1.5, -0.5], "greater than 0"),
        ([float("nan"), 1.0], "greater than 0"),
        ([1.0], "There are 2 sources of documents but 1 proportions"),
    ):
        with pytest.raises(LlamoryError, match=message):
            make_sources(paths, proportions)
    with pytest.raises(LlamoryError, match="add up to 1"):
        DocumentStream([Source(paths[0]), Source(paths[1])], TOKENIZER, seed=0)
