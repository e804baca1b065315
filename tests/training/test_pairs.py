"""Training pairs: what is read of published JSONL and BEIR folders, what is refused, and how groups are drawn."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.documents.beir import read_beir
from llamory.errors import LlamoryError
from llamory.training.pairs import Example, FalseNegativeFreeSampler, GroupDataset, Pairs, load_pairs


def write_lines(file, *entries):
    file.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries))
    return file


@pytest.fixture
def beir(tmp_path):
    """A folder of five documents and three queries, one of them judged nowhere."""
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    documents = [
        ("d1", "River", "It runs south."),
        ("d2", "", "A stone."),
        ("d3", "Bridge", "Of wood."),
        ("d4", "", ""),
        ("d5", "", "Oil."),
    ]
    write_lines(folder / "corpus.jsonl", *({"_id": i, "title": title, "text": text} for i, title, text in documents))
    queries = [("q1", "where to"), ("q2", "what material"), ("q3", "who knows")]
    write_lines(folder / "queries.jsonl", *({"_id": i, "text": text} for i, text in queries))
    rows = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td3\t1", "q2\td2\t1", "q2\td4\t1"]
    write_lines(folder / "qrels" / "train.tsv", *rows)
    return folder


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_published_lines_are_read_with_their_scores_and_places(tmp_path):
    first = {"query": "a", "pos": ["b", "c"], "neg": ["d"], "pos_scores": [3, 2.5], "neg_scores": [-1]}
    file = write_lines(tmp_path / "pairs.jsonl", first, "", {"query": "e", "pos": "f", "prompt": "unused"})
    one, two = load_pairs([file]).examples
    assert one == Example("a", ("b", "c"), ("d",), (3.0, 2.5), (-1.0,), f"{file}:1")
    assert two == Example("e", ("f",), location=f"{file}:3")
    assert one.scored and not two.scored


def test_beir_judgements_become_positives_and_negatives(beir):
    pairs = load_pairs([beir])
    judged = beir / "qrels" / "train.tsv"
    assert pairs.examples == [
        Example("where to", ("River It runs south.",), ("A stone.",), location=f"{judged}:2"),
        Example("what material", ("Bridge Of wood.", "A stone."), location=f"{judged}:4"),  # d4 has no text
    ]
    assert sorted(pairs.documents) == ["A stone.", "Bridge Of wood.", "Oil.", "River It runs south."]
    assert read_beir(beir).qrels["q1"] == {"d1": 2.0, "d2": 0.0}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "not valid JSON"),
        ({"pos": ["b"]}, "no 'query'"),
        ({"query": " ", "pos": ["b"]}, "'query' is empty"),
        ({"query": "a"}, "no 'pos'"),
        ({"query": "a", "pos": []}, "'pos' is empty"),
        ({"query": "a", "pos": ["b", ""]}, "'pos' holds an empty text"),
        ({"query": "a", "pos": ["b"], "neg": [4]}, "should be a string, not int"),
        ({"query": "a", "pos": ["b"], "pos_scores": [1, 2]}, "2 numbers for the 1 texts in 'pos'"),
        ({"query": "a", "pos": ["b"], "pos_scores": ["much"]}, "'pos_scores' should be a list of numbers"),
    ],
)
def test_a_broken_line_is_named_or_passed_over(tmp_path, line, sentence):
    file = write_lines(tmp_path / "pairs.jsonl", {"query": "a", "pos": ["b"]}, line)
    with pytest.raises(LlamoryError, match=rf"pairs\.jsonl:2: .*{sentence}"):
        load_pairs([file])
    assert len(load_pairs([file], skip_broken=True)) == 1


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("q1\td9\t1", r"train\.tsv:7: there is no 'd9' in corpus\.jsonl"),
        ("q9\td1\t1", r"train\.tsv:7: there is no 'q9' in queries\.jsonl"),
        ("q1 d1 1", r"train\.tsv:7: a line should be"),
        ("q1\td1\tmuch", r"train\.tsv:7: a line should be"),
    ],
)
def test_a_broken_judgement_is_named(beir, row, sentence):
    with (beir / "qrels" / "train.tsv").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(LlamoryError, match=sentence):
        load_pairs([beir])


def test_what_is_no_data_is_refused(beir, documents, tmp_path):
    with pytest.raises(LlamoryError, match="there is no split 'dev'; there is train"):
        load_pairs([beir], split="dev")
    with pytest.raises(LlamoryError, match="nowhere"):
        load_pairs([tmp_path / "nowhere"])
    with pytest.raises(LlamoryError, match=r"has no training data: give \.jsonl"):
        load_pairs([documents])


def test_a_negative_that_answers_the_query_elsewhere_is_left_out():
    pairs = Pairs(
        [
            Example("a", ("b",), ("c", "d", "a"), (1.0,), (0.1, 0.2, 0.3)),
            Example("a", ("c",), ("e",)),
        ]
    )
    assert pairs.examples[0] == Example("a", ("b",), ("d",), (1.0,), (0.2,))
    assert pairs.answers == {"a": {"b", "c"}}


# ---- groups ----------------------------------------------------------------------------------------------------------

POSITIVES, NEGATIVES = tuple(f"p{i}" for i in range(3)), tuple(f"n{i}" for i in range(9))


def texts(group):
    return [group[key] for key in group if key.startswith("negative_")]


def test_groups_are_drawn_anew_in_each_epoch_and_the_same_at_each_call():
    groups = GroupDataset(Pairs([Example("q", POSITIVES, NEGATIVES)]), 5, seed=1)
    drawn = [groups[epoch] for epoch in range(300)]
    assert drawn == [GroupDataset(groups.pairs, 5, seed=1)[epoch] for epoch in range(300)]
    assert all(len(set(texts(group))) == 4 for group in drawn)
    assert {group["positive"] for group in drawn} == set(POSITIVES)
    counts = Counter(text for group in drawn for text in texts(group))
    assert set(counts) == set(NEGATIVES)
    # each of 300 groups holds a negative with a chance of 4/9: 133 of them, give or take five deviations of 8.6
    assert all(90 < count < 176 for count in counts.values())
    assert drawn != [GroupDataset(groups.pairs, 5, seed=2)[epoch] for epoch in range(300)]


def test_a_query_with_too_few_negatives_gets_them_again_and_one_without_any_gets_others():
    pairs = Pairs(
        [
            Example("q", ("a",), ("b", "c")),
            Example("r", ("d", "e"), ("f", "a")),
            Example("q", ("g",)),
            Example("s", ("f",)),
        ]
    )
    groups = GroupDataset(pairs, 4, seed=0)
    drawn = [[set(texts(groups[4 * epoch + i])) for epoch in range(50)] for i in range(4)]
    assert all(each == {"b", "c"} for each in drawn[0])
    assert set.union(*drawn[2]) == {"b", "c", "f"}  # not a, which answers q elsewhere
    assert set.union(*drawn[3]) == {"a", "b", "c"}
    only = Pairs([Example("q", ("a",)), Example("r", ("b",), ("a",))])
    with pytest.raises(LlamoryError, match="all other queries"):
        GroupDataset(only, 2, seed=0)[0]


def test_scores_go_with_their_documents():
    scores = {text: float(i) for i, text in enumerate((*POSITIVES, *NEGATIVES))}
    example = Example(
        "q", POSITIVES, NEGATIVES[:2], tuple(map(scores.get, POSITIVES)), tuple(map(scores.get, NEGATIVES[:2]))
    )
    groups = GroupDataset(Pairs([example]), 4, seed=0, scored=True)
    for epoch in range(20):
        group = groups[epoch]
        assert group["scores"] == [scores[text] for text in (group["positive"], *texts(group))]
        assert set(texts(group)) == set(NEGATIVES[:2])  # its own again, as others have no score


# ---- batches ---------------------------------------------------------------------------------------------------------


@st.composite
def data(draw):
    """Few texts and many queries, so that documents are shared in all ways."""
    documents = [f"d{i}" for i in range(draw(st.integers(4, 12)))]
    few = st.lists(st.sampled_from(documents), min_size=1, max_size=3, unique=True).map(tuple)
    queries = st.sampled_from([*(f"q{i}" for i in range(12)), "d0", "d1"])
    examples = draw(st.lists(st.builds(Example, queries, few, few), min_size=3, max_size=30))
    return Pairs([*examples, Example("x", ("x1",), ("x2", "x3"))])


@given(data(), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_no_document_of_a_step_answers_another_query_or_is_one(pairs, batch_size, processes, group_size):
    groups = GroupDataset(pairs, group_size, seed=3)
    samplers = [FalseNegativeFreeSampler(groups, batch_size, process=p, processes=processes) for p in range(processes)]
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert len({len(batches) for batches in shares}) == len({len(sampler) for sampler in samplers}) == 1
        assert len(shares[0]) <= len(samplers[0])
        for step in zip(*shares, strict=True):
            assert len({len(batch) for batch in step}) == 1  # or processes couldn't share their documents
            assert len(step[0]) <= batch_size
            numbers = [number for batch in step for number in batch]
            assert all(number // len(pairs) == epoch for number in numbers)
            for mine in numbers:
                others = {text for other in numbers if other != mine for text in groups.documents(other)}
                query = groups[mine]["anchor"]
                assert others.isdisjoint(pairs.answers[query] | {query})


def test_an_epoch_shows_every_query_once_if_none_shares_a_document():
    pairs = Pairs(Example(f"q{i}", (f"a{i}",), (f"n{i}",)) for i in range(50))
    sampler = FalseNegativeFreeSampler(GroupDataset(pairs, 2, seed=0), 8)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append([number - 50 * epoch for batch in sampler for number in batch])
        assert sorted(epochs[-1]) == list(range(50))
    assert len(sampler) == 7
    assert epochs[0] != epochs[1] != epochs[2]


def test_queries_of_a_few_topics_go_together_as_far_as_they_can():
    chance = random.Random(0)
    pairs = Pairs(Example(f"q{i}", (f"topic {chance.randrange(4)}",)) for i in range(100))
    sampler = FalseNegativeFreeSampler(GroupDataset(pairs, 1, seed=0), 8)
    assert max(map(len, sampler)) == 4
    assert min(map(len, sampler)) > 1  # a lone query has no negatives


def test_the_first_epoch_is_sampled_once_and_only_when_needed(monkeypatch):
    groups = GroupDataset(Pairs(Example(f"q{i}", (f"a{i}",), (f"n{i}",)) for i in range(50)), 2, seed=0)
    sampled = []
    documents = groups.documents
    monkeypatch.setattr(groups, "documents", lambda number: sampled.append(number) or documents(number))
    sampler = FalseNegativeFreeSampler(groups, 8)
    assert sampled == []
    assert len(sampler) == len(list(sampler)) == 7
    assert sorted(sampled) == list(range(50))
