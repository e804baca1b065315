"""Perplexity of a document's last tokens by the tokens in memory (Tworkowski et al. 2023, arXiv:2307.03170)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from llamory.common.progress import ProgressBar
from llamory.documents import read_documents
from llamory.errors import LlamoryError
from llamory.evaluation.plots import draw_curves
from llamory.evaluation.results import CurveResultsFile, file_identity, run_models, run_pending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank


@dataclass(frozen=True)
class LongText:
    """The last tokens of a long document."""

    source: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The loss of one document with `memory` tokens in memory, in nats per scored token."""

    memory: int
    source: str
    loss: float
    seconds: float


@dataclass(frozen=True)
class PerplexityPoint:
    """The mean over documents with `memory` tokens in memory; losses are in nats per token."""

    memory: int
    documents: int
    loss: float
    standard_error: float | None  # of the mean loss, over documents; None for a single document
    perplexity: float
    change: float | None  # mean of the paired differences to the loss without memory; None if that wasn't scored
    change_standard_error: float | None


def read_long_texts(
    paths: Iterable[Path],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = None,
    text_field: str = "text",
) -> list[LongText]:
    """The last `length` tokens, without special tokens, of the first `limit` documents that have as many.

    Raises a LlamoryError if a path can't be read, or no document is long enough.
    """

    def token_ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    texts: list[LongText] = []
    count, longest = 0, ""
    for document in read_documents(paths, text_field=text_field):
        count += 1
        longest = max(longest, document.text, key=len)
        # A token has at least one byte (some tokenizers add one in front), so short texts need no tokenization.
        ids = token_ids(document.text) if len(document.text.encode()) + 1 >= length else []
        if len(ids) >= length:
            texts.append(LongText(document.source, tuple(ids[-length:])))
            if len(texts) == limit:
                return texts
    if not texts:
        raise LlamoryError(
            f"No document has the {length:,} tokens that are needed (of {count}, the longest has "
            f"{len(token_ids(longest)):,}); name longer documents or give shorter memories."
        )
    return texts


@torch.no_grad()
def tail_loss(
    model: LongLlamaForCausalLM,
    input_ids: Sequence[int],
    memory: int,
    *,
    tokens: int = 256,
    local: int = 1,
    windows: MemoryBank | None = None,
) -> float:
    """The loss of a text's last tokens, in nats (computed in float32), with the tokens before them in memory.

    Each scored token is predicted from the last window, which holds `local` tokens and the scored ones, and from
    memory. Memory holds the `memory` tokens before the window, encoded from their own start: a part of a longer memory
    would carry information from still earlier tokens in the keys and values of deeper layers.

    Args:
        input_ids: at least `memory + local + tokens` ids; earlier ones are ignored.
        tokens: number of scored tokens.
        local: tokens before them in the local context, at least 1.
        windows: independently encoded windows of this text, to which new ones are added. With it, each window of the
            memory is encoded by itself, counted from the end, and all are attached together.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    start = len(ids) - tokens - local
    assert memory >= 0 and tokens >= 1 and local >= 1 and start >= memory
    cache = None
    if memory:
        before = ids[start - memory : start]
        cache = model.memory_cache(model.read(before) if windows is None else _attach_windows(model, before, windows))
    window = ids[None, start:-1].to(model.device)
    output = model(
        window, past_key_values=cache, use_cache=True, last_context_length=window.shape[1], logits_to_keep=tokens
    )
    assert output.logits is not None
    return F.cross_entropy(output.logits[0].float(), ids[-tokens:].to(output.logits.device)).item()


def _attach_windows(model: LongLlamaForCausalLM, ids: torch.Tensor, windows: MemoryBank) -> MemoryBank:
    """A memory of these tokens' windows, encoded independently; missing full windows are added to `windows`."""
    context = model.config.max_position_embeddings
    names = [str(number) for number in range(len(ids) // context)]
    for number, name in enumerate(names):
        if name not in windows.segments:
            stop = len(ids) - number * context
            model.read(ids[stop - context : stop], windows, segment=name)
    memory = model.new_memory()
    memory.attach(windows, names[::-1])
    if rest := len(ids) % context:
        model.read(ids[:rest], memory, segment="rest")
    return memory


def run_perplexity(
    model: LongLlamaForCausalLM,
    texts: Sequence[LongText],
    memories: Sequence[int],
    *,
    tokens: int = 256,
    local: int = 1,
    independent_windows: bool = False,
    scores: list[Score] | None = None,
    on_score: Callable[[Score], Any] | None = None,
    title: str | None = None,
) -> list[Score]:
    """Score the last tokens of documents with memories of several lengths, the shortest first.

    Raises a LlamoryError if the window is longer than the model's context, or a text is too short.

    Args:
        memories: tokens in memory, encoded from scratch for each.
        independent_windows: encode each window of a document by itself, once for all lengths.
        scores: of an earlier run; they are kept and not computed again.
        on_score: called after every score, when it is in `scores`.
        title: of the progress on standard error; None for no progress.
    """
    check_window(tokens, local, model.config.max_position_embeddings)
    longest = max(memories) + tokens + local
    for text in texts:
        if len(text.input_ids) < longest:
            raise LlamoryError(f"{text.source} is too short: it should have {longest:,} tokens.")
    scores = [] if scores is None else scores
    done = {(score.memory, score.source) for score in scores}
    pending = [(memory, text) for memory in sorted(set(memories)) for text in texts]
    pending = [(memory, text) for memory, text in pending if (memory, text.source) not in done]
    if independent_windows:
        document_order = {text.source: index for index, text in enumerate(texts)}
        pending.sort(key=lambda each: document_order[each[1].source])
    windows: dict[str, MemoryBank] = {}  # of the current document

    def run(item: tuple[int, LongText], bar: ProgressBar) -> tuple[Score, str]:
        (memory, text), started = item, time.perf_counter()
        if independent_windows and text.source not in windows:
            windows.clear()
            windows[text.source] = model.new_memory()
        loss = tail_loss(model, text.input_ids, memory, tokens=tokens, local=local, windows=windows.get(text.source))
        score = Score(memory, text.source, loss, time.perf_counter() - started)
        bar.advance(memory + tokens)
        return score, f"{memory:,} tokens in memory, {text.source}: loss {loss:.4f} ({score.seconds:.1f} s)"

    total = sum(memory + tokens for memory, _ in pending)
    run_pending(pending, run, tokens=total, add=scores.append, on_score=on_score, title=title)
    return scores


def check_window(tokens: int, local: int, context: int) -> None:
    """Raise a LlamoryError if a window of `context` tokens can't hold the scored and the local tokens."""
    if tokens < 1 or local < 1:
        raise LlamoryError("At least one token must be scored, and one before it must be local.")
    if tokens + local - 1 > context:
        raise LlamoryError(f"{tokens} scored tokens after {local} local ones don't fit a window of {context} tokens.")


def perplexity_curve(scores: Sequence[Score]) -> list[PerplexityPoint]:
    """The means over documents, the shortest memory first, without lengths that lack the scores of some documents."""
    by_memory: dict[int, dict[str, float]] = {}
    for score in scores:
        by_memory.setdefault(score.memory, {})[score.source] = score.loss
    documents = max(map(len, by_memory.values()), default=0)
    baseline = by_memory.get(0, {})
    points = []
    for memory, losses in sorted(by_memory.items()):
        if len(losses) == documents:
            loss, error = _mean(list(losses.values()))
            changes = [losses[source] - baseline[source] for source in losses] if len(baseline) == documents else []
            change = _mean(changes) if changes else (None, None)
            points.append(PerplexityPoint(memory, documents, loss, error, math.exp(loss), *change))
    return points


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


class PerplexityResultsFile(CurveResultsFile[Score]):
    """Perplexity results of one or more models on the same documents."""

    evaluation = "perplexity"
    score_class = Score
    make_curve = staticmethod(perplexity_curve)


def evaluate(
    names: Sequence[str],
    data: Sequence[Path],
    memories: Sequence[int],
    output: Path,
    *,
    tokens: int = 256,
    local: int = 1,
    independent_windows: bool = False,
    limit: int | None = None,
    text_field: str = "text",
    model_kwargs: Mapping[str, Any] | None = None,
) -> PerplexityResultsFile:
    """Score models on documents, and write `perplexity.json` and `perplexity.png`; existing results are resumed.

    The models have the same tokenizer; `limit` and `text_field` are those of `read_long_texts`, `model_kwargs` those of
    `load_long_model`, and the other arguments those of `run_perplexity`. Raises a LlamoryError if no document is long
    enough, tokenizers differ, or the output has other results.
    """
    from llamory.models.base import load_tokenizer

    if (context := (model_kwargs or {}).get("context_length")) is not None:
        check_window(tokens, local, context)
    texts: list[LongText] = []
    length = max(memories) + tokens + local
    for name in names:
        found = read_long_texts(data, load_tokenizer(name), length, limit=limit, text_field=text_field)
        if texts and found != texts:
            raise LlamoryError(f"The model {name} has another tokenizer than {names[0]}; score them one by one.")
        texts = found
    settings: dict[str, Any] = {"files": file_identity(data), "tokens": tokens, "local": local}
    settings |= {"windows": "independent"} if independent_windows else {}
    settings["documents"] = [text.source for text in texts]
    results = PerplexityResultsFile(output / "perplexity.json", settings)
    kwargs: dict[str, Any] = {"tokens": tokens, "local": local, "independent_windows": independent_windows}

    def run(_: str, model: LongLlamaForCausalLM, scores: list[Score], title: str) -> None:
        run_perplexity(model, texts, memories, **kwargs, scores=scores, on_score=lambda _: results.write(), title=title)

    run_models(results, names, run, model_kwargs)
    # No error bars: documents differ more from each other than a document from itself with another memory.
    lines = results.lines("memory", "perplexity")
    labels: dict[str, Any] = {"x_label": "Tokens in memory", "y_label": "Perplexity"}
    draw_curves(output / "perplexity.png", f"The last {tokens} tokens of long documents", lines, **labels)
    return results
