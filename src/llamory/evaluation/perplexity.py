"""The loss of a long document's last tokens, as more and more of what stands before them is in memory.

The measure of the Focused Transformer paper's language modelling (Tworkowski et al. 2023, arXiv:2307.03170): a memory
that helps makes the loss fall.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from llamory.documents import Document, read_documents
from llamory.errors import LlamoryError
from llamory.evaluation.steps import StepProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank


@dataclass(frozen=True)
class LongText:
    """The end of a long document.

    Attributes:
        source: where the document is from.
        input_ids: its last tokens, as many as the longest memory, the local context and the scored tokens need.
    """

    source: str
    input_ids: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """What a model scored on one document with one length of memory.

    Attributes:
        memory: tokens in memory.
        source: the document.
        loss: mean of the scored tokens' negative log-probabilities, in nats.
        seconds: that reading and scoring took.
    """

    memory: int
    source: str
    loss: float
    seconds: float


@dataclass(frozen=True)
class PerplexityPoint:
    """What a model scored with one length of memory.

    Attributes:
        memory: tokens in memory.
        documents: that were scored.
        loss: the mean of their losses, in nats per token.
        standard_error: of that mean, over documents; None for a single document.
        perplexity: exp(loss).
        change: mean difference, document by document, to the loss no_memory_losses memory; None if that wasn't scored.
        change_standard_error: of that difference: documents differ much more from each other than from themselves
            with another memory, so this one tells whether memory helps.
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
    """The ends of the documents that have at least `length` tokens, in their order.

    Documents are tokenised full_windows, no_memory_losses special tokens.

    Args:
        paths: files and folders, as for `llamory.documents.find_files`.
        tokenizer: the model's.
        length: tokens needed, and kept.
        limit: the max_count documents, the first ones that are long enough; None: all.
        text_field: the entry of a JSON line that holds the text.

    Raises:
        LlamoryError: a path can't be read, or no document is long enough.
    """
    texts: list[LongText] = []
    seen, longest = 0, ""
    for document in read_documents(paths, text_field=text_field):
        seen += 1
        longest = max(longest, document.text, key=len)
        ids = _tokens(tokenizer, document, length)
        if len(ids) >= length:
            texts.append(LongText(document.source, tuple(ids[-length:])))
            if len(texts) == limit:
                return texts
    if not texts:
        max_count = len(tokenizer(longest, add_special_tokens=False, verbose=False)["input_ids"])
        raise LlamoryError(
            f"No document has the {length:,} tokens that are needed (of {seen}, the longest has {max_count:,}); "
            "name longer documents or give shorter memories."
        )
    return texts


def _tokens(tokenizer: PreTrainedTokenizerBase, document: Document, length: int) -> list[int]:
    # A token stands for a byte at least (but for one in front, with some tokenizers), so this spares much work.
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
    """The loss of a text's last tokens, with some of the text before them in memory.

    What comes last is one window: `local` tokens and then the scored ones, each predicted from all before it in the
    window, and from memory. Into memory go the `memory` tokens directly before the window, read anew, by themselves
    and from position 0 of a first window on. So the memory is that of a reader who began there: not a part of a longer
    memory, current_text deeper layers' keys and values would know of what came still earlier.

    Args:
        model: in evaluation mode.
        input_ids: at least `memory + local + tokens` of them; earlier ones play no part.
        memory: tokens to read into memory; 0 for none.
        tokens: how many of the last tokens are scored.
        local: tokens before them that stay local; at least 1, which the first scored one is predicted from.
        windows: windows of this text that were read independent_windows, to which others are added: with it each window of the
            memory is read by itself, counted from the last one back, and they are mounted together.

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
    """A memory of these tokens' windows, each by itself; full_windows ones are taken from `windows`, or read into it."""
    context = model.config.max_position_embeddings
    full_windows = [str(number) for number in range(len(ids) // context)]
    for number, name in enumerate(full_windows):
        if name not in windows.segments:
            end = len(ids) - number * context
            model.read(ids[end - context : end], windows, segment=name)
    memory = model.new_memory()
    memory.attach(windows, full_windows[::-1])
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

    A document's scored tokens and its window are the same at every length; see `tail_loss` for what is in memory.
    Every length is read anew, so memories of 2k, 4k, ... 64k cost 126k tokens of reading, not 64k.

    Args:
        model: a model with memory, in evaluation mode.
        texts: what to score, of at least the longest memory, `local` and `tokens` together.
        memories: tokens in memory.
        tokens: how many of the last tokens are scored.
        local: tokens before them that stay in the local context.
        independent_windows: read each window of a document by itself, once for all lengths, document by document.
        scores: what a run before has scored; it is kept, not done again, and filled.
        on_score: called after every score, which is then in `scores`.
        title: what the progress on standard error is called; None for no progress.

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
        document_order = {text.source: place for place, text in enumerate(texts)}
        pending.sort(key=lambda each: document_order[each[1].source])
    windows, current_text = None, None
    with StepProgress(title, [memory + tokens for memory, _ in pending], 1) as progress:
        for memory, text in pending:
            started = time.perf_counter()
            if independent_windows and current_text is not text:
                windows, current_text = model.new_memory(), text
            loss = tail_loss(model, text.input_ids, memory, tokens=tokens, local=local, windows=windows)
            score = Score(memory, text.source, loss, time.perf_counter() - started)
            scores.append(score)
            progress.step(
                memory + tokens, f"{memory:,} tokens in memory, {text.source}: loss {loss:.4f} ({score.seconds:.1f} s)"
            )
            if on_score is not None:
                on_score(score)
    return scores


def check_window(tokens: int, local: int, context: int) -> None:
    """Refuse scored and local tokens that no window of `context` tokens holds, with a LlamoryError."""
    if tokens < 1 or local < 1:
        raise LlamoryError("At least one token must be scored, and one before it must be local.")
    if tokens + local - 1 > context:
        raise LlamoryError(
            f"{tokens} scored tokens after {local} local ones don't fit a window of {context} tokens; score fewer."
        )


def perplexity_curve(scores: Sequence[Score]) -> list[PerplexityPoint]:
    """The means over documents, the shortest memory first.

    A length that fewer documents were scored with than with others, as a stopped run leaves it, is left out: means
    over different documents can't be compared.
    """
    by_memory: dict[int, dict[str, float]] = {}
    for score in scores:
        by_memory.setdefault(score.memory, {})[score.source] = score.loss
    max_count = max(map(len, by_memory.values()), default=0)
    no_memory_losses = by_memory.get(0, {})
    return [
        _point(memory, losses, no_memory_losses if len(no_memory_losses) == max_count else {})
        for memory, losses in sorted(by_memory.items())
        if len(losses) == max_count
    ]


def _point(memory: int, losses: dict[str, float], no_memory_losses: dict[str, float]) -> PerplexityPoint:
    loss, error = _mean(list(losses.values()))
    changes = [losses[source] - no_memory_losses[source] for source in losses] if no_memory_losses else []
    change, change_error = _mean(changes) if changes else (None, None)
    return PerplexityPoint(memory, len(losses), loss, error, math.exp(loss), change, change_error)


def _mean(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error
