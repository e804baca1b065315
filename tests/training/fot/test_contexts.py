"""Contexts of a batch: which rows see which, how many, how random, and that nothing flows backwards."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from llamory.embedding.encoder import escape_slot_tokens
from llamory.embedding.pipeline import export_sentence_transformer, load_embedder
from llamory.errors import LlamoryError
from llamory.llara import LlaraTemplate
from llamory.longllama.crossbatch import cross_batch_attention, crossbatch_contexts
from llamory.training.fot.contexts import (
    PUBLISHED_CROSSBATCH_SCHEDULES,
    ContextSampler,
    ContextSamplingConfig,
    embedder,
)


def first_token_vectors(rows):
    """Vectors with whole numbers, so that their products are exact and often tie."""
    return torch.stack([torch.stack([row[0] % 3, row[0] % 2, row[1] % 3]) for row in rows]).float()


def reached(contexts):
    """Per row, all rows that it hears of through any number of memory layers."""
    found = []
    for row in range(len(contexts)):
        seen, todo = set(), list(contexts[row])
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += contexts[other]
        found.append(seen)
    return found


@st.composite
def chosen(draw):
    """A sampling_config with a crossbatch_schedule, the batch, and what was chosen."""
    packing, packs = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    batch = packing * packs
    entry = st.tuples(st.integers(0, packing - 1), st.integers(0, batch - packing))
    crossbatch_schedule = draw(st.lists(entry, min_size=1, max_size=packs))
    more = {}
    if any(negatives for _, negatives in crossbatch_schedule) and draw(st.booleans()):
        sizes = draw(st.sets(st.integers(0, batch - packing), min_size=1))
        more = {"schedule": draw(st.sampled_from(["sampled", "curriculum"])), "sizes": sorted(sizes)}
    sampling_config = ContextSamplingConfig(
        crossbatch_schedule=crossbatch_schedule, negatives=draw(st.sampled_from(["random", "similar"])), **more
    )
    documents = draw(st.none() | st.lists(st.integers(0, 4), min_size=batch, max_size=batch))
    ids = torch.randint(0, 9, (batch, 2), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    step, stream = draw(st.integers(0, 10**6)), draw(st.integers(0, 9))
    context_sampler = ContextSampler(sampling_config, batch, packing, draw(st.integers(0, 9)), first_token_vectors)
    numbers = None if documents is None else torch.tensor(documents)
    contexts = context_sampler.select(step, stream, ids, numbers)
    return context_sampler, step, stream, ids, documents, contexts


@settings(deadline=None, max_examples=200)
@given(case=chosen())
def test_who_is_never_seen_and_who_always_is(case):
    context_sampler, step, _, _, documents, contexts = case
    packing, batch, crossbatch_schedule = (
        context_sampler.dataset_packing,
        context_sampler.batch_size,
        context_sampler.sampling_config.crossbatch_schedule,
    )
    size = context_sampler.size(step)
    for row, seen in enumerate(contexts):
        pack = row // packing
        positives, negatives = crossbatch_schedule[pack * len(crossbatch_schedule) // (batch // packing)]
        if negatives and size is not None:
            negatives = size
        assert len(set(seen)) == len(seen)
        own = [other for other in seen if other // packing == pack]
        assert own == [
            row - back for back in range(1, positives + 1) if (row - back) // packing == pack and row >= back
        ]
        others = [other for other in seen if other // packing != pack]
        assert len(others) <= negatives
        assert all(0 <= other < batch for other in others)
        if documents is not None:
            assert all(documents[other] != documents[row] for other in others)
    for row, known in enumerate(reached(contexts)):
        later = range(row, (row // packing + 1) * packing)
        assert known.isdisjoint(later), "a row hears of itself or of a later chunk of its pack"


@settings(deadline=None, max_examples=100)
@given(case=chosen())
def test_a_row_gets_all_it_asks_for_as_far_as_rows_stand_before_it(case):
    context_sampler, step, stream, ids, documents, contexts = case
    packing, batch, crossbatch_schedule = (
        context_sampler.dataset_packing,
        context_sampler.batch_size,
        context_sampler.sampling_config.crossbatch_schedule,
    )
    order = context_sampler.order(step, stream)
    assert sorted(order) == list(range(batch))
    size = context_sampler.size(step)
    vectors = first_token_vectors(list(ids)).tolist()
    for row, seen in enumerate(contexts):
        pack = row // packing
        negatives = crossbatch_schedule[pack * len(crossbatch_schedule) // (batch // packing)][1]
        wanted = size if negatives and size is not None else negatives
        others = [other for other in seen if other // packing != pack]
        possible = [
            other
            for other in range(batch)
            if other // packing != pack
            and order[other] < order[row]
            and (documents is None or documents[other] != documents[row])
        ]
        assert len(others) == min(wanted, len(possible))
        assert set(others) <= set(possible)
        if context_sampler.sampling_config.negatives == "similar":
            products = {o: sum(a * b for a, b in zip(vectors[row], vectors[o], strict=True)) for o in possible}
            assert others == sorted(possible, key=lambda o: (-products[o], o))[:wanted]


@pytest.mark.parametrize(("name", "batch"), [("3b", 32), ("7b", 64)])
def test_published_mixes(name, batch):
    """Quarters of the batch in turn; chunk c has c earlier ones; none is short of negatives, as others stand first."""
    context_sampler = ContextSampler(
        ContextSamplingConfig(crossbatch_schedule=PUBLISHED_CROSSBATCH_SCHEDULES[name]), batch, 4
    )
    for step in range(20):
        contexts = context_sampler.select(step)
        for row, seen in enumerate(contexts):
            positives, negatives = PUBLISHED_CROSSBATCH_SCHEDULES[name][row // (batch // 4)]
            assert sum(other // 4 == row // 4 for other in seen) == min(positives, row % 4)
            assert sum(other // 4 != row // 4 for other in seen) == negatives


def test_published_numbers():
    assert PUBLISHED_CROSSBATCH_SCHEDULES == {
        "3b": [(0, 0), (1, 1), (2, 1), (3, 0)],
        "7b": [(0, 0), (1, 2), (2, 5), (3, 4)],
    }


@pytest.mark.parametrize(
    ("packs", "entries", "shares"), [(4, 4, [1, 1, 1, 1]), (5, 4, [2, 1, 1, 1]), (6, 4, [2, 1, 2, 1]), (7, 2, [4, 3])]
)
def test_shares_are_as_even_as_can_be(packs, entries, shares):
    crossbatch_schedule = [(positives, 0) for positives in range(entries)]
    contexts = ContextSampler(ContextSamplingConfig(crossbatch_schedule=crossbatch_schedule), packs * 8, 8).select(0)
    most = [max(len(contexts[row]) for row in range(pack * 8, pack * 8 + 8)) for pack in range(packs)]
    assert most == [entry for entry, share in enumerate(shares) for _ in range(share)]


@pytest.mark.parametrize("negatives", [1, 3, 7])
def test_as_few_rows_go_short_as_can_without_circles(negatives):
    """Without earlier chunks the first row in an order sees nothing, the second one row, and so on."""
    context_sampler = ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(0, negatives)]), 8)
    shortest = set()
    for step in range(60):
        contexts = context_sampler.select(step)
        assert sorted(len(seen) for seen in contexts) == [min(row, negatives) for row in range(8)]
        shortest.add(next(row for row, seen in enumerate(contexts) if not seen))
    assert shortest == set(range(8))


# ---- draws -----------------------------------------------------------------------------------------------------------


def test_random_negatives_are_drawn_evenly():
    """Rows of the last pack see 2 of 6: 15 pairs, all as likely."""
    context_sampler = ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(0, 0), (0, 0), (0, 0), (0, 2)]), 8, 2)
    steps = 3000
    for row in (6, 7):
        pairs = Counter(tuple(sorted(context_sampler.select(step)[row])) for step in range(steps))
        assert len(pairs) == 15
        chi_square = sum((count - steps / 15) ** 2 / (steps / 15) for count in pairs.values())
        assert chi_square < 36.1  # 14 degrees of freedom, one run in a thousand is beyond it


@pytest.mark.parametrize(
    "way", [{"cross_batch_range": 5}, {"crossbatch_schedule": [(0, 0), (0, 3)]}], ids=["range", "crossbatch_schedule"]
)
def test_sampled_sizes_are_drawn_evenly_per_step(way):
    context_sampler = ContextSampler(ContextSamplingConfig(**way, schedule="sampled", sizes=[1, 2, 5]), 12)
    steps = 3000
    counts = Counter(context_sampler.size(step) for step in range(steps))
    assert set(counts) == {1, 2, 5}
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 13.9  # 2 degrees of freedom, 1 in 1000
    following = Counter((context_sampler.size(step), context_sampler.size(step + 1)) for step in range(steps))
    assert sum((count - steps / 9) ** 2 / (steps / 9) for count in following.values()) < 26.2  # 8 degrees
    for step in range(5):
        for stream in (0, 3):
            assert max(len(seen) for seen in context_sampler.select(step, stream)) == context_sampler.size(step)


def test_a_step_can_be_made_again_alone():
    sampling_config = ContextSamplingConfig(crossbatch_schedule=[(0, 0), (1, 3)], schedule="sampled", sizes=[1, 2, 3])
    context_sampler = ContextSampler(sampling_config, 16, 2, seed=3)
    forwards = [context_sampler.select(step, stream) for step in range(6) for stream in range(3)]
    torch.manual_seed(5)
    np.random.seed(5)
    again = ContextSampler(sampling_config, 16, 2, seed=3)
    backwards = [again.select(step, stream) for step in reversed(range(6)) for stream in reversed(range(3))]
    assert forwards == backwards[::-1]
    assert len({str(contexts) for contexts in forwards}) == len(forwards)
    other = ContextSampler(sampling_config, 16, 2, seed=4)
    assert [other.select(step, stream) for step in range(6) for stream in range(3)] != forwards


def test_negatives_count_as_many_drawn_evenly_on_a_logarithmic_scale_and_positives_once():
    context_sampler = ContextSampler(
        ContextSamplingConfig(crossbatch_schedule=[(1, 3)], negative_weight=(2, 200)), 8, 2, seed=3
    )
    draws = []
    for step in range(500):
        contexts = context_sampler.select(step, 1)
        weights = context_sampler.weights(contexts, step, 1)
        assert context_sampler.weights(contexts, step, 1) == weights
        for row, (seen, counted) in enumerate(zip(contexts, weights, strict=True)):
            assert [count == 1 for count in counted] == [other // 2 == row // 2 for other in seen]
            negatives = {count for count in counted if count != 1}
            assert len(negatives) <= 1  # one number for all that a row sees
            draws += negatives
    assert min(draws) >= 2 and max(draws) <= 200 and len(set(draws)) == len(draws)
    fourths = np.histogram(np.log(np.array(draws) / 2) / np.log(100), 4, (0, 1))[0]
    assert sum((count - len(draws) / 4) ** 2 / (len(draws) / 4) for count in fourths) < 16.3  # 3 degrees, 1 in 1000
    assert ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(1, 3)]), 8, 2).weights(contexts, 0) is None


# ---- range and schedules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crossbatch_stepping", [False, True])
def test_a_range_is_the_published_one(crossbatch_stepping):
    context_sampler = ContextSampler(
        ContextSamplingConfig(cross_batch_range=3, crossbatch_stepping=crossbatch_stepping), 8, 4
    )
    assert context_sampler.select(7) == crossbatch_contexts(8, 3, 4, crossbatch_stepping)
    assert context_sampler.order(7) == list(range(8))
    sampled = ContextSamplingConfig(
        cross_batch_range=6, crossbatch_stepping=crossbatch_stepping, schedule="sampled", sizes=[2, 6]
    )
    context_sampler = ContextSampler(sampled, 8, 4)
    assert {str(context_sampler.select(step)) for step in range(20)} == {
        str(crossbatch_contexts(8, size, 4, crossbatch_stepping)) for size in (2, 6)
    }


def test_a_range_leaves_out_the_same_document_at_another_place():
    context_sampler = ContextSampler(ContextSamplingConfig(cross_batch_range=3), 6, 2)
    contexts = context_sampler.select(0, documents=torch.tensor([1, 1, 2, 2, 1, 3]))
    assert contexts == [[], [0], [1, 0], [2, 1, 0], [3, 2], [4, 3, 2]]


def curriculum(**changes):
    settings = {"cross_batch_range": 4, "schedule": "curriculum", "sizes": [1, 2, 4], "advance_at_accuracy": 0.9}
    return ContextSampler(ContextSamplingConfig(**settings | changes), 8)


def test_grows_when_the_mean_is_reached_and_ten_steps_are_over():
    context_sampler = curriculum()
    sizes = []
    for step in range(25):
        sizes.append(context_sampler.size(step))
        context_sampler.observe(1.0)
    assert sizes == [1] * 10 + [2] * 10 + [4] * 5


def test_grows_by_the_exponential_mean():
    """After one 0 and k ones the mean is 1 - 0.9^k: above 0.9 from k = 22 on."""
    context_sampler = curriculum()
    context_sampler.observe(0.0)
    for step in range(22):
        assert context_sampler.size(step) == 1
        context_sampler.observe(1.0)
    assert context_sampler.size(23) == 2


def test_does_not_grow_below_the_mean():
    context_sampler = curriculum(advance_at_accuracy=0.98)
    for _ in range(200):
        context_sampler.observe(0.97)
    assert context_sampler.size(0) == 1


def test_goes_on_where_its_state_was_taken():
    accuracies = [0.5] * 7 + [1.0] * 60
    whole = curriculum()
    states = [whole.state_dict()]
    for accuracy in accuracies:
        whole.observe(accuracy)
        states.append(whole.state_dict())
    assert whole.size(0) == 4
    for at, state in enumerate(states):
        resumed = curriculum()
        resumed.load_state_dict(json.loads(json.dumps(state)))
        for accuracy in accuracies[at:]:
            resumed.observe(accuracy)
        assert resumed.state_dict() == whole.state_dict()
    with pytest.raises(LlamoryError, match="stage 3 of its curriculum, but 2 sizes are given"):
        curriculum(sizes=[1, 2]).load_state_dict(whole.state_dict())


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, float("nan")])
def test_what_is_no_accuracy(accuracy):
    with pytest.raises(LlamoryError, match="from 0 to 1"):
        curriculum().observe(accuracy)


# ---- flow of information ---------------------------------------------------------------------------------------------


def through_memory_layers(x, contexts, layers):
    """Layers of cross-batch attention, each with the stream of the one below."""
    positions = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    cos, sin = positions.cos()[None], positions.sin()[None]
    for _ in range(layers):
        x = 0.6 * (x + cross_batch_attention(x, x, x, cos, sin, contexts))
    return x


def changed_places(contexts, row, column, layers):
    """(batch, seq) which outputs change with one token's stream."""
    batch, seq = len(contexts), 3
    x = torch.randn(batch, 1, seq, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = through_memory_layers(x, contexts, layers)
    x[row, :, column] += 1
    return (through_memory_layers(x, contexts, layers) != before).any(-1)[:, 0]


@pytest.mark.parametrize(
    "way",
    [{"crossbatch_schedule": [(1, 2), (2, 1), (0, 3)]}, {"cross_batch_range": 4, "crossbatch_stepping": True}],
    ids=str,
)
@pytest.mark.parametrize("step", range(3))
def test_only_what_is_seen_flows_and_nothing_from_later_chunks_through_any_layers(way, step):
    batch, packing = 9, 3
    contexts = ContextSampler(ContextSamplingConfig(**way), batch, packing).select(step)
    known = reached(contexts)
    for row in range(batch):
        for column in (0, 2):
            for layers, seen in ((1, contexts), (batch, known)):
                expected = torch.zeros(batch, 3, dtype=torch.bool)
                expected[row, column:] = True
                for other in range(batch):
                    expected[other] |= row in seen[other]
                changed = changed_places(contexts, row, column, layers)
                assert torch.equal(changed, expected)
                assert not changed[row, :column].any(), "a token is told a later one of its row"
                assert not changed[row // packing * packing : row].any(), "a later chunk reaches an earlier one"


def test_rows_that_see_one_another_would_be_told_their_next_tokens():
    """Why circles are kept out; and the test above would notice."""
    assert not changed_places([[1], [0]], 0, 2, layers=1)[0, :2].any()
    assert changed_places([[1], [0]], 0, 2, layers=2)[0, :2].all()


# ---- settings that can't be ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling_config", "told"),
    [
        ({}, "either a crossbatch_schedule"),
        ({"crossbatch_schedule": [(0, 1)], "cross_batch_range": 1}, "not both"),
        ({"crossbatch_schedule": []}, "list of pairs"),
        ({"crossbatch_schedule": [(1, 2, 3)]}, "list of pairs"),
        ({"crossbatch_schedule": [1, 2]}, "list of pairs"),
        ({"crossbatch_schedule": [(0, -1)]}, "at least 0, not -1"),
        ({"crossbatch_schedule": [(0.5, 1)]}, "an integer"),
        ({"cross_batch_range": -2}, "at least 0, not -2"),
        ({"cross_batch_range": 3, "schedule": "sampled", "sizes": [1, -1]}, "at least 0, not -1"),
        ({"cross_batch_range": 3, "schedule": "sampled"}, "needs sizes"),
        ({"cross_batch_range": 3, "schedule": "curriculum", "sizes": [2, 1]}, "must increase"),
        ({"cross_batch_range": 3, "schedule": "curriculum", "sizes": [2, 4]}, "more than the cross_batch_range of 3"),
        ({"cross_batch_range": 3, "sizes": [1]}, "choose one of them"),
        (
            {"crossbatch_schedule": [(1, 0)], "schedule": "sampled", "sizes": [1]},
            "no entry of the crossbatch_schedule has any",
        ),
        ({"crossbatch_schedule": [(0, 1)], "schedule": "grows"}, "no schedule 'grows'"),
        ({"crossbatch_schedule": [(0, 1)], "negatives": "hard"}, "can't be 'hard'"),
        ({"cross_batch_range": 1, "negatives": "similar"}, "need a crossbatch_schedule"),
        ({"crossbatch_schedule": [(0, 1)], "crossbatch_stepping": True}, "goes with a cross_batch_range"),
        ({"crossbatch_schedule": [(0, 1)], "negative_weight": (3, 2)}, "negative_weight must be two numbers above 0"),
        ({"crossbatch_schedule": [(0, 1)], "advance_at_accuracy": 0.0}, "above 0 and at most 1"),
        ({"crossbatch_schedule": [(0, 1)], "advance_at_accuracy": 1.5}, "above 0 and at most 1"),
        ({"crossbatch_schedule": [(0, 1)], "advance_at_accuracy": float("nan")}, "above 0 and at most 1"),
    ],
)
def test_plans_that_cannot_be(sampling_config, told):
    with pytest.raises(LlamoryError, match=told):
        ContextSamplingConfig(**sampling_config)


@pytest.mark.parametrize(
    ("sampling_config", "batch", "packing", "told"),
    [
        ({"cross_batch_range": 8}, 8, 2, "can't see 8 others in a batch of 8"),
        ({"crossbatch_schedule": [(0, 7)]}, 8, 2, "can't see 7 rows of other documents.* 6 of them"),
        ({"crossbatch_schedule": [(0, 1)]}, 2, 2, "0 of them"),
        ({"crossbatch_schedule": [(0, 1)], "schedule": "sampled", "sizes": [1, 7]}, 8, 2, "can't see 7 rows"),
        ({"crossbatch_schedule": [(2, 0)]}, 8, 2, "at most 1; choose at least 3"),
        ({"crossbatch_schedule": [(0, 1)] * 5}, 8, 2, "5 entries, but .* 4 documents"),
        ({"crossbatch_schedule": [(0, 1)]}, 8, 3, "can't be divided"),
        ({"crossbatch_schedule": [(0, 0)]}, 0, 1, "at least 1"),
        ({"crossbatch_schedule": [(0, 1)], "negatives": "similar"}, 8, 1, "need a retriever"),
    ],
)
def test_batches_that_do_not_fit_the_plan(sampling_config, batch, packing, told):
    with pytest.raises(LlamoryError, match=told):
        ContextSampler(ContextSamplingConfig(**sampling_config), batch, packing)


def test_as_many_contexts_as_there_are_rows_for():
    assert [len(seen) for seen in ContextSampler(ContextSamplingConfig(cross_batch_range=7), 8).select(0)] == list(
        range(8)
    )
    ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(1, 6)]), 8, 2)


def test_what_is_missing_for_a_choice():
    sampling_config = ContextSamplingConfig(crossbatch_schedule=[(0, 1)], negatives="similar")
    context_sampler = ContextSampler(sampling_config, 4, embed=first_token_vectors)
    for ids in (None, torch.zeros(3, 2)):
        with pytest.raises(LlamoryError, match="token ids of all 4 rows"):
            context_sampler.select(0, input_ids=ids)
    with pytest.raises(LlamoryError, match=r"4 rows, but document numbers of shape \(3,\)"):
        ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(0, 1)]), 4).select(0, documents=torch.zeros(3))
    with pytest.raises(LlamoryError, match="seed"):
        ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(0, 1)]), 4, seed=-1)


WORDS = ["river", "money", "cat", "dog"]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), negatives=st.integers(1, 6))
def test_similar_negatives_are_the_first_of_a_plain_sort(seed, negatives):
    """The rows of the last place may see all others."""
    ids = torch.randint(0, 9, (8, 2), generator=torch.Generator().manual_seed(seed))
    sampling_config = ContextSamplingConfig(
        crossbatch_schedule=[(0, 0), (0, 0), (0, 0), (1, negatives)], negatives="similar"
    )
    contexts = ContextSampler(sampling_config, 8, 2, embed=first_token_vectors).select(seed, 1, ids)
    vectors = first_token_vectors(list(ids))
    for row, own in ((6, []), (7, [6])):
        ranked = torch.sort(vectors[:6] @ vectors[row], descending=True, stable=True).indices
        assert contexts[row] == own + ranked[:negatives].tolist()


@pytest.fixture(scope="module")
def word_tokenizer():
    ids = {word: at for at, word in enumerate(["[UNK]", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>")


@pytest.fixture(scope="module")
def word_model():
    """The mean of one unit vector per known word; its ids aren't those of the tokenizer that wrote the rows."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(WORDS, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.vstack([np.zeros(len(WORDS)), 3 * np.eye(len(WORDS))]).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def test_any_sentence_transformers_model_finds_similar_rows(word_tokenizer, word_model, tmp_path):
    folder = tmp_path / "model"
    word_model.save(str(folder), create_model_card=False)
    texts = ["river river", "money money", "river cat", "money dog"]
    ids = torch.tensor(word_tokenizer(["<s> " + text for text in texts])["input_ids"])
    half = 0.5**0.5
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [half, 0, half, 0], [0, half, 0, half]])
    for model in (word_model, SentenceTransformer(str(folder), device="cpu")):
        embed = embedder(model, word_tokenizer, batch_size=3)
        vectors = embed(list(ids))
        torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
        assert not vectors.requires_grad
        sampling_config = ContextSamplingConfig(
            crossbatch_schedule=[(0, 0), (0, 0), (0, 1), (0, 1)], negatives="similar"
        )
        assert ContextSampler(sampling_config, 4, embed=embed).select(0, input_ids=ids)[2:] == [[0], [1]]
    assert not any(weight.requires_grad for weight in word_model.parameters())


def test_texts_that_the_model_would_not_take_are_changed(word_tokenizer, word_model):
    embed = embedder(word_model, word_tokenizer, clean=lambda texts: [text.replace("cat", "dog") for text in texts])
    vectors = embed([torch.tensor(word_tokenizer("cat")["input_ids"])])
    assert vectors.tolist() == [[0, 0, 0, 1]]


def test_a_folder_that_llara_exported_reads_rows_as_documents(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("River stone.", "Silver morning, harbour.", "<s1>")]
    with_slots = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    LlaraTemplate.from_tokenizer(with_slots).prepare_model(model)
    model.save_pretrained(tmp_path / "checkpoint")
    with_slots.save_pretrained(tmp_path / "checkpoint")
    retriever = load_embedder(tmp_path / "checkpoint", device="cpu")
    exported = export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "exported")
    embed = embedder(
        SentenceTransformer(str(exported)), tokenizer, clean=lambda texts: escape_slot_tokens(retriever, texts)
    )
    wanted = [retriever.encode_document(text) for text in ("River stone.", "Silver morning, harbour.", "< s1>")]
    torch.testing.assert_close(embed(rows).cpu(), torch.tensor(np.stack(wanted)), atol=1e-5, rtol=0)
