"""Perplexity of a long document's last tokens as a function of the preceding tokens in memory.

The language-modelling measure of the Focused Transformer paper (Tworkowski et al. 2023, arXiv:2307.03170): a useful
memory lowers the loss.
"""

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
from llamory.documents import Document, read_documents
from llamory.errors import LlamoryError
from llamory.evaluation.plots import Line, draw_curves
from llamory.evaluation.results import CurveResultsFile, display_names, file_identity, model_metadata

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank


@dataclass(frozen=True)
class LongText:
    """The end of a long document.

    Attributes:
        source: of the document.
        input_ids: its last tokens, enough for the longest memory, the local context and the scored tokens.
    """

    source: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The loss of one document with one memory length.

    Attributes:
        memory: tokens in memory.
        source: the document.
        loss: mean of the scored tokens' negative log-probabilities, in nats.
        seconds: of encoding and scoring.
    """

    memory: int
    source: str
    loss: float
    seconds: float


@dataclass(frozen=True)
class PerplexityPoint:
    """The mean over documents with one memory length.

    Attributes:
        memory: tokens in memory.
        documents: number of documents.
        loss: mean loss, in nats per token.
        standard_error: of that mean, over documents; None for a single document.
        perplexity: exp(loss).
        change: mean of the paired differences to the loss without memory; None if that wasn't scored.
        change_standard_error: of `change`. Documents differ more from each other than from themselves with another
            memory, so this error shows whether memory helps.
    """

    memory: int
    documents: int
    loss: float
    standard_error: float | None
    perplexity: float
    change: float | None
    change_standard_error: float | None


def read_long_texts(
    paths: Iterable[Path],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    *,
    limit: int | None = None,
    text_field: str = "text",
) -> list[LongText]:
    """The last `length` tokens of each document that has as many, in order; no special tokens are added.

    Args:
        paths: files and folders, as for `llamory.documents.find_files`.
        tokenizer: the model's tokenizer.
        length: tokens needed and kept.
        limit: take only the first so many long documents; None takes all.
        text_field: the key of a JSON line's text.

    Raises:
        LlamoryError: a path can't be read, or no document is long enough.
    """
    texts: list[LongText] = []
    count, longest = 0, ""
    for document in read_documents(paths, text_field=text_field):
        count += 1
        longest = max(longest, document.text, key=len)
        ids = _tokens(tokenizer, document, length)
        if len(ids) >= length:
            texts.append(LongText(document.source, tuple(ids[-length:])))
            if len(texts) == limit:
                return texts
    if not texts:
        most = len(tokenizer(longest, add_special_tokens=False, verbose=False)["input_ids"])
        raise LlamoryError(
            f"No document has the {length:,} tokens that are needed (of {count}, the longest has {most:,}); "
            "name longer documents or give shorter memories."
        )
    return texts


def _tokens(tokenizer: PreTrainedTokenizerBase, document: Document, length: int) -> list[int]:
    # A token has at least one byte (some tokenizers add one in front), so short texts need no tokenization.
    if len(document.text.encode()) + 1 < length:
        return []
    ids: list[int] = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


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
    """The loss of a text's last tokens, with the tokens before them in memory.

    The last window holds `local` tokens and the scored ones; each is predicted from the window before it and from
    memory. Memory holds the `memory` tokens before the window, encoded from their own start: a part of a longer memory
    would carry information from still earlier tokens in the keys and values of deeper layers.

    Args:
        model: in evaluation mode.
        input_ids: at least `memory + local + tokens` ids; earlier ones are ignored.
        memory: tokens in memory; 0 for none.
        tokens: number of scored tokens at the end.
        local: tokens before them in the local context, at least 1.
        windows: independently encoded windows of this text, to which new ones are added. With it, each window of the
            memory is encoded by itself, counted from the end, and all are attached together.

    Returns:
        The mean negative log-probability of the scored tokens, in nats, computed in float32.
    """
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    start = len(ids) - tokens - local
    assert memory >= 0 and tokens >= 1 and local >= 1 and start >= memory
    cache = None
    if memory:
        before = ids[start - memory : start]
        read = model.read(before) if windows is None else _attach_windows(model, before, windows)
        cache = model.memory_cache(read)
    window = ids[None, start:-1].to(model.device)
    output = model(
        input_ids=window,
        past_key_values=cache,
        use_cache=True,
        last_context_length=window.shape[1],
        logits_to_keep=tokens,
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
    on_score: Callable[[Score], None] | None = None,
    title: str | None = None,
) -> list[Score]:
    """Score the last tokens of documents with memories of several lengths, the shortest first.

    A document's scored tokens and last window are the same at every length. Each memory is encoded from scratch, so
    lengths of 2k, 4k, ... 64k cost 126k tokens of encoding; see `tail_loss`.

    Args:
        model: a model with memory, in evaluation mode.
        texts: at least as long as the longest memory, `local` and `tokens` together.
        memories: tokens in memory.
        tokens: number of scored tokens.
        local: tokens before them in the local context.
        independent_windows: encode each window of a document by itself, once for all lengths.
        scores: those of an earlier run; they are kept and not computed again.
        on_score: called after every score, when it is in `scores`.
        title: of the progress on standard error; None for no progress.

    Raises:
        LlamoryError: the window is longer than the model's context, or a text is too short.
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
    windows, current_text = None, None
    total = sum(memory + tokens for memory, _ in pending)
    with ProgressBar(title or "", total, unit="tokens", shown=title is not None) as bar:
        for number, (memory, text) in enumerate(pending, 1):
            started = time.perf_counter()
            if independent_windows and current_text is not text:
                windows, current_text = model.new_memory(), text
            loss = tail_loss(model, text.input_ids, memory, tokens=tokens, local=local, windows=windows)
            score = Score(memory, text.source, loss, time.perf_counter() - started)
            scores.append(score)
            bar.advance(memory + tokens)
            bar.print(
                f"{title} {number}/{len(pending)}: {memory:,} tokens in memory, {text.source}: loss {loss:.4f} "
                f"({score.seconds:.1f} s)"
            )
            if on_score is not None:
                on_score(score)
    return scores


def check_window(tokens: int, local: int, context: int) -> None:
    """Raise a LlamoryError if a window of `context` tokens can't hold the scored and the local tokens."""
    if tokens < 1 or local < 1:
        raise LlamoryError("At least one token must be scored, and one before it must be local.")
    if tokens + local - 1 > context:
        raise LlamoryError(
            f"{tokens} scored tokens after {local} local ones don't fit a window of {context} tokens; score fewer."
        )


def perplexity_curve(scores: Sequence[Score]) -> list[PerplexityPoint]:
    """The means over documents, the shortest memory first.

    Means over different documents can't be compared, so lengths that an interrupted run left incomplete are left out.
    """
    by_memory: dict[int, dict[str, float]] = {}
    for score in scores:
        by_memory.setdefault(score.memory, {})[score.source] = score.loss
    documents = max(map(len, by_memory.values()), default=0)
    baseline = by_memory.get(0, {})
    return [
        _point(memory, losses, baseline if len(baseline) == documents else {})
        for memory, losses in sorted(by_memory.items())
        if len(losses) == documents
    ]


def _point(memory: int, losses: dict[str, float], baseline: dict[str, float]) -> PerplexityPoint:
    loss, error = _mean(list(losses.values()))
    changes = [losses[source] - baseline[source] for source in losses] if baseline else []
    change, change_error = _mean(changes) if changes else (None, None)
    return PerplexityPoint(memory, len(losses), loss, error, math.exp(loss), change, change_error)


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

    Args:
        names: of models with the same tokenizer, as for `load_long_model`.
        data: files and folders of long documents.
        memories: tokens in memory.
        output: a folder; it is created if it does not exist.
        tokens, local, independent_windows: as for `run_perplexity`.
        limit, text_field: as for `read_long_texts`.
        model_kwargs: passed to `load_long_model`.

    Raises:
        LlamoryError: no document is long enough, tokenizers differ, or the output has other results.
    """
    model_kwargs = model_kwargs or {}
    if model_kwargs.get("context_length") is not None:
        check_window(tokens, local, model_kwargs["context_length"])
    texts = _read_for_all(names, data, max(memories) + tokens + local, limit=limit, text_field=text_field)
    settings: dict[str, Any] = {"files": file_identity(data), "tokens": tokens, "local": local}
    settings |= {"windows": "independent"} if independent_windows else {}
    settings["documents"] = [text.source for text in texts]
    from llamory.longllama.loading import load_long_model  # after the checks: it takes a second

    results = PerplexityResultsFile(output / "perplexity.json", settings)
    shown = display_names(names)
    for name in names:
        model = load_long_model(name, **model_kwargs)
        run_perplexity(
            model,
            texts,
            memories,
            tokens=tokens,
            local=local,
            independent_windows=independent_windows,
            scores=results.run(name, model_metadata(model)),
            on_score=lambda _: results.write(),
            title=shown[name],
        )
        del model  # two models at once may not fit
    results.write()
    shown = display_names(results.scores)
    curves = {shown[name]: results.curve(name) for name in results.scores}
    # No error bars: documents differ more from each other than a document from itself with another memory.
    lines = [
        Line(name, [point.memory for point in curve], [point.perplexity for point in curve])
        for name, curve in curves.items()
    ]
    draw_curves(
        output / "perplexity.png",
        f"The last {tokens} tokens of long documents",
        lines,
        x_label="Tokens in memory",
        y_label="Perplexity",
    )
    return results


def _read_for_all(
    names: Sequence[str], data: Sequence[Path], length: int, *, limit: int | None, text_field: str
) -> list[LongText]:
    """The documents' last tokens, which must be the same for all models."""
    from llamory.models.base import load_tokenizer

    texts: list[LongText] = []
    for name in names:
        found = read_long_texts(data, load_tokenizer(name), length, limit=limit, text_field=text_field)
        if texts and found != texts:
            raise LlamoryError(
                f"The model {name} has another tokenizer than {names[0]}, so their perplexities can't be compared; "
                "score them one by one."
            )
        texts = found
    return texts
