"""The loss with memory, compared with a direct computation over the visible tokens."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.evaluation.perplexity import (
    LongText,
    Score,
    perplexity_curve,
    read_long_texts,
    run_perplexity,
    tail_loss,
)
from plain_longllama import logits, sight
from tiny_models import CONTEXT, make_long_llama

TOKENS = 6


@pytest.fixture(scope="module")
def model():
    return make_long_llama()


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed))


def mean_loss(predicted: torch.Tensor, ids: torch.Tensor, tokens: int = TOKENS) -> float:
    """Of the last tokens, from logits of which row i predicts token i + 1."""
    told = predicted.double().log_softmax(-1)
    return -statistics.fmean(float(told[place - 1, ids[place]]) for place in range(len(ids) - tokens, len(ids)))


def expected(model, ids: torch.Tensor, memory: int, local: int = 1) -> float:
    """One forward over windows: the memory's, then the one of local and scored tokens."""
    ids = ids[len(ids) - memory - local - TOKENS :]
    seen = sight(len(ids), 0, CONTEXT, TOKENS + local)
    return mean_loss(logits(model, ids, seen, model.config.mem_layers), ids)


@pytest.mark.parametrize("local", [1, 4, 11])
def test_without_memory_it_is_a_stock_llama_s_loss(model, local) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "initializer_range", "rms_norm_eps", "rope_parameters")
    stock = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names})).eval()
    stock.load_state_dict(model.state_dict())
    ids = text(70)
    end = ids[-TOKENS - local :]
    with torch.no_grad():
        wanted = mean_loss(stock(end[None]).logits[0], end)
    assert tail_loss(model, ids.tolist(), 0, tokens=TOKENS, local=local) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("memory", [1, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("local", [1, 5])
def test_with_memory_it_is_one_reading_of_so_many_tokens_and_the_window(model, memory, local) -> None:
    ids = text(90)
    wanted = expected(model, ids, memory, local)
    assert tail_loss(model, ids.tolist(), memory, tokens=TOKENS, local=local) == pytest.approx(wanted, abs=1e-5)
    without = tail_loss(model, ids.tolist(), 0, tokens=TOKENS, local=local)
    assert abs(without - wanted) > 1e-3  # else the comparison would say nothing


@pytest.mark.parametrize("memory", [1, 15, 16, 40, 64])
def test_independent_windows_are_segments(model, memory) -> None:
    ids, local = text(90), 5
    windows = model.new_memory()
    known = tail_loss(model, ids.tolist(), 48, tokens=TOKENS, local=local, windows=windows)
    found = tail_loss(model, ids.tolist(), memory, tokens=TOKENS, local=local, windows=windows)
    start = len(ids) - TOKENS - local
    memories = model.new_memory()
    for number, end in enumerate(range(start, start - memory, -CONTEXT)):
        model.read(ids[max(end - CONTEXT, start - memory) : end], memories, segment=f"window {number}")
    with torch.no_grad():
        cache = model.memory_cache(memories)
        predicted = model(ids[None, start:], past_key_values=cache, last_context_length=TOKENS + local).logits[0]
    end = ids[start:]
    assert found == pytest.approx(mean_loss(predicted, end), abs=1e-5)
    assert windows.length() == max(48, memory // CONTEXT * CONTEXT)
    if memory > CONTEXT:
        in_order = tail_loss(model, ids.tolist(), memory, tokens=TOKENS, local=local)
        assert abs(found - in_order) > 1e-5
    assert known != found


def test_a_run_with_independent_windows_encodes_document_by_document(model) -> None:
    texts = [LongText(name, tuple(text(90, seed).tolist())) for name, seed in (("a", 0), ("b", 1))]
    scores = run_perplexity(model, texts, [0, 20, 40], tokens=TOKENS, independent_windows=True)
    assert [(score.source, score.memory) for score in scores] == [(n, m) for n in "ab" for m in (0, 20, 40)]
    for score in scores:
        ids = dict(zip("ab", (each.input_ids for each in texts), strict=True))[score.source]
        alone = tail_loss(model, ids, score.memory, tokens=TOKENS, windows=model.new_memory())
        assert score.loss == pytest.approx(alone, abs=1e-6)


def test_tokens_before_the_memory_are_ignored(model) -> None:
    ids = text(90).tolist()
    whole = tail_loss(model, ids, 32, tokens=TOKENS)
    assert tail_loss(model, ids[-32 - TOKENS - 1 :], 32, tokens=TOKENS) == whole
    assert tail_loss(model, [5, 6, 7, *ids[-32 - TOKENS - 1 :]], 32, tokens=TOKENS) == whole


def test_every_document_is_scored_with_every_memory_the_shortest_first(model) -> None:
    texts = [LongText(f"{seed}.txt", tuple(text(50, seed).tolist())) for seed in (1, 2)]
    told = []
    scores = run_perplexity(model, texts, [32, 0, 16, 16], tokens=TOKENS, on_score=told.append)
    assert told == scores
    places = [(memory, source) for memory in (0, 16, 32) for source in ("1.txt", "2.txt")]
    assert [(score.memory, score.source) for score in scores] == places
    for score in scores:
        ids = torch.tensor(texts[int(score.source[0]) - 1].input_ids)
        assert score.loss == pytest.approx(expected(model, ids, score.memory), abs=1e-5)


def test_earlier_scores_are_kept(model) -> None:
    texts = [LongText("a", tuple(text(50).tolist()))]
    known, told = [Score(16, "a", 7.0, 0.1)], []
    scores = run_perplexity(model, texts, [0, 16], tokens=TOKENS, scores=known, on_score=told.append)
    assert scores is known
    assert [(score.memory, score.loss == 7.0) for score in scores] == [(16, True), (0, False)]
    assert [score.memory for score in told] == [0]


def test_a_window_beyond_the_context_or_a_short_text_is_refused(model) -> None:
    texts = [LongText("short.txt", tuple(range(3, 30)))]
    with pytest.raises(LlamoryError, match="17 local ones don't fit a window of 16 tokens"):
        run_perplexity(model, texts, [0], tokens=TOKENS, local=17)
    with pytest.raises(LlamoryError, match=r"short\.txt is too short: it should have 39 tokens"):
        run_perplexity(model, texts, [32], tokens=TOKENS)
    run_perplexity(model, texts, [0], tokens=CONTEXT)  # just fits


# ---- documents -------------------------------------------------------------------------------------------------------


def test_only_long_documents_are_taken_and_their_ends_kept(tokenizer, tmp_path) -> None:
    for name, words in {"a": 5, "b": 60, "c": 300, "d": 200}.items():
        (tmp_path / f"{name}.txt").write_text(" ".join(f"The sky {number} is blue." for number in range(words)))
    found = read_long_texts([tmp_path], tokenizer, 2000)
    assert [text.source for text in found] == [str(tmp_path / "c.txt"), str(tmp_path / "d.txt")]
    whole = tokenizer((tmp_path / "c.txt").read_text(), add_special_tokens=False)["input_ids"]
    assert list(found[0].input_ids) == whole[-2000:]
    assert read_long_texts([tmp_path], tokenizer, 2000, limit=1) == found[:1]


def test_documents_that_are_all_too_short_are_one_sentence(tokenizer, tmp_path) -> None:
    (tmp_path / "a.txt").write_text("The sky is blue. " * 10)
    (tmp_path / "b.txt").write_text("The sky.")
    most = len(tokenizer((tmp_path / "a.txt").read_text(), add_special_tokens=False)["input_ids"])
    with pytest.raises(LlamoryError, match=rf"has the 5,000 tokens .* \(of 2, the longest has {most}\)"):
        read_long_texts([tmp_path], tokenizer, 5000)


# ---- curves ----------------------------------------------------------------------------------------------------------


def scored(losses: dict[int, list[float]]) -> list[Score]:
    return [Score(memory, str(i), loss, 0.1) for memory, row in losses.items() for i, loss in enumerate(row)]


def test_a_curve_has_means_over_documents_and_paired_changes() -> None:
    zero, more = perplexity_curve(scored({16: [1.5, 2.5, 3.2], 0: [2.0, 3.0, 4.0]}))
    assert (zero.memory, zero.documents, zero.loss, zero.change) == (0, 3, 3.0, 0.0)
    assert zero.perplexity == pytest.approx(math.e**3)
    assert zero.standard_error == pytest.approx(1 / math.sqrt(3))
    # Differences -0.5, -0.5, -0.8: mean -0.6, deviation sqrt((0.01 + 0.01 + 0.04) / 2).
    assert more.change == pytest.approx(-0.6)
    assert more.change_standard_error == pytest.approx(math.sqrt(0.03) / math.sqrt(3))


def test_incomplete_lengths_are_left_out() -> None:
    curve = perplexity_curve(scored({0: [2.0, 3.0], 16: [1.0, 2.0], 32: [0.5]}))
    assert [point.memory for point in curve] == [0, 16]
    (only,) = perplexity_curve(scored({8: [2.0]}))
    assert (only.standard_error, only.change, only.change_standard_error) == (None, None, None)


@given(st.dictionaries(st.integers(0, 99), st.lists(st.floats(0, 20), min_size=3, max_size=3), min_size=1))
def test_the_order_of_scores_does_not_matter(losses) -> None:
    scores = scored(losses)
    assert [vars(point) for point in perplexity_curve(scores[::-1])] == [
        pytest.approx(vars(point)) for point in perplexity_curve(scores)
    ]
