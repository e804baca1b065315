"""LLARA as an embedding model: a trained checkpoint becomes a Sentence Transformers folder of stock modules.

The embedding of a text is the mean of the last hidden states at the slot tokens, normalised (Li et al. 2023, section
3.3). Documents take the summary prompt, queries that or the prediction prompt. The folder needs nothing but Sentence
Transformers: a chat template writes the prompts, and word weights of 1 for slots and 0 for all else pick the slots.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamory.embedding.encoder import FlatEncoder
from llamory.embedding.export_tokenizer import SEGMENT_SEPARATOR, query_prompt_line
from llamory.embedding.modules import (
    DEFAULT_MAX_LENGTH,
    build_sentence_transformer,
    check_folder,
    check_saved,
    first_line,
    llama_config,
    require_template,
)
from llamory.embedding.whitening import Whitening, fit_whitening, pseudo_queries, reroute, whitening_router
from llamory.errors import LlamoryError
from llamory.llara.template import QUERY_PROMPTS, LlaraTemplate, slot_tokens
from llamory.models import base as backbone

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PACKAGED_RETRIEVER = "retriever"  # the adapter that "default" means


def export_sentence_transformer(
    model: str | Path,
    output: str | Path,
    *,
    max_length: int = DEFAULT_MAX_LENGTH,
    similarity: str = "cosine",
    query_prompt: str | None = None,
    whitening_texts: Sequence[str] = (),
) -> Path:
    """Write a LLARA checkpoint as a Sentence Transformers folder that loads without llamory.

    `encode_document` and `encode` read the summary prompt's slots, `encode_query` those of its original_prompt prompt.

    Args:
        model: a checkpoint folder, as transformers saves it, with its tokenizer and its template in `config.llara`; or
            the hub id of one.
        output: the folder to make; it may exist if it is empty.
        max_length: limit in tokens for a text with its prompt; longer texts are cut, the prompt never is.
        similarity: name of the similarity function that the folder declares.
        query_prompt: "prediction" or "summary"; by default what the checkpoint says.
        whitening_texts: texts without labels, of the kind that is to be found, that whitening is fitted on (`fit_whitening_on_texts`);
            by default it is what lies beside the checkpoint, if there is any.

    Returns:
        The output folder.

    Raises:
        LlamoryError: the model is no LLARA checkpoint, its tokenizer doesn't fit, or the output folder isn't empty.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LlamoryError(f"{output} already exists and isn't an empty folder; choose another output folder.")
    embedder = build_sentence_transformer(
        _resolve_name(model), max_length, device="cpu", similarity=similarity, whitened=not whitening_texts
    )
    if whitening_texts:
        original_prompt = embedder[0].config.llara["query_prompt"]
        embedder.extend(_fit_on_texts(embedder, whitening_texts).modules(original_prompt))
    if query_prompt is not None:
        set_query_prompt(embedder, query_prompt)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        save_embedder(embedder, partial)
        if output.exists():
            output.rmdir()
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def sample_passages(
    model: str | Path,
    paths: str | Path | Sequence[str | Path],
    *,
    number: int = 1024,
    max_length: int = DEFAULT_MAX_LENGTH,
) -> list[str]:
    """Passages of documents, drawn at random, such as `fit_whitening_on_texts` is fitted on.

    Args:
        model: the LLARA checkpoint, or an adapter of one, that is to read them.
        paths: files and folders, as for `llamory.llara.data.load_examples`.
        number: how many, at most.
        max_length: limit in tokens for a passage with its prompt.

    Raises:
        LlamoryError: the model is no LLARA checkpoint, or the documents can't be read or have no text.
    """
    from llamory.llara.data import load_examples, passage_texts  # needs the extra "train"

    name = _resolve_name(model)
    template, tokenizer = require_template(name, backbone.load_config(name)), backbone.load_tokenizer(name)
    prompt = len(template.encode(tokenizer, "", max_length=max_length, predict=False))
    example_length = max_length - prompt + template.overhead()  # an example has both prompts
    examples = load_examples(paths, tokenizer, template, max_length=example_length, skip_broken=True, quiet=True)
    return passage_texts(examples, tokenizer, number)


def fit_whitening_on_texts(
    model: str | Path, texts: Sequence[str], *, max_length: int | None = None, device: str | None = None
) -> Whitening:
    """Fit a checkpoint's whitening on texts without labels: as documents, and their first words as queries.

    Args:
        model: a LLARA checkpoint or an adapter of one, without what it may have been whitened with before.
        texts: at least `llamory.embedding.whitening.MIN_TEXTS`; some hundreds are enough.
        max_length: limit in tokens for a text with its prompt.
        device: a torch device; by default the best there is.

    Raises:
        LlamoryError: the model is no LLARA checkpoint, or there are too few texts.
    """
    return _fit_on_texts(
        build_sentence_transformer(_resolve_name(model), max_length, device=device, whitened=False), texts
    )


def _fit_on_texts(embedder: SentenceTransformer, texts: Sequence[str]) -> Whitening:
    texts = escape_slot_tokens(embedder, list(texts))
    documents, original_prompt = _encode(embedder, texts, "document"), query_prompt(embedder)
    queries = {}
    for prompt in QUERY_PROMPTS:
        set_query_prompt(embedder, prompt)
        queries[prompt] = _encode(embedder, pseudo_queries(texts), "query")
    set_query_prompt(embedder, str(original_prompt))
    return fit_whitening(documents, queries)


def _encode(embedder: SentenceTransformer, texts: list[str], task: str) -> Tensor:
    encoder = FlatEncoder.from_embedder(embedder)
    return torch.as_tensor(embedder.encode(texts, task=task) if encoder is None else encoder.encode(texts, task))


def check_embedder(model: str | Path) -> None:
    """See, before long work starts, that there is such a model and that it turns texts into vectors.

    Raises:
        LlamoryError: there isn't, or it doesn't.
    """
    name = _resolve_name(model)
    check_folder(name)
    if (config := llama_config(name)) is not None:
        require_template(name, config)


def load_embedder(
    model: str | Path,
    *,
    max_length: int | None = None,
    device: str | None = None,
    query_prompt: str | None = None,
    shared: bool = False,
    **model_kwargs: Any,
) -> SentenceTransformer:
    """Load a model that turns texts into vectors.

    Args:
        model: "default" for the packaged adapter of SmolLM2-135M, a LLARA checkpoint or an adapter of one, a Sentence
            Transformers folder, or a hub id.
        max_length: limit in tokens for a text with its prompt; by default 512 for a LLARA checkpoint (or what it can
            read, if that is less), else what the folder says.
        device: a torch device; by default the best there is.
        query_prompt: of a LLARA model, "prediction" or "summary"; by default what the model says.
        shared: of an adapter in float32, with the base model's weights that another model has that was loaded so (see
            `llamory.models.adapters`): less memory, embedding takes a little longer, and it can't be trained.
        model_kwargs: further arguments of `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises:
        LlamoryError: there is no such model, it is a LLaMA that wasn't trained to embed, or it has no such prompt.
    """
    embedder = _load_embedder(_resolve_name(model), max_length, device, model_kwargs, shared=shared)
    if query_prompt is not None:
        set_query_prompt(embedder, query_prompt)
    return embedder


def _load_embedder(
    name: str, max_length: int | None, device: str | None, model_kwargs: Mapping[str, Any], *, shared: bool
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    check_folder(name)
    if llama_config(name) is not None:
        return build_sentence_transformer(name, max_length, device=device, model_kwargs=model_kwargs, shared=shared)
    try:
        embedder = SentenceTransformer(name, device=device, model_kwargs=dict(model_kwargs))
    except (OSError, ValueError) as error:
        raise LlamoryError(f"{name} can't be loaded as an embedding model: {first_line(error)}.") from error
    if max_length is not None:
        embedder.max_seq_length = max_length
    return embedder


def mean_embedder(
    model: str | Path, *, max_length: int = DEFAULT_MAX_LENGTH, **model_kwargs: Any
) -> SentenceTransformer:
    """A LLaMA that wasn't trained to embed, as it is: the mean of the last hidden states of a text's tokens.

    What trained retrievers are compared with. Arguments as for `load_embedder`; the model is named as for
    `llamory.models.base.resolve`, so that "default" is the packaged base model.

    Raises:
        LlamoryError: there is no such LLaMA.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    config = backbone.load_config(model)
    transformer = Transformer(str(backbone.resolve(model)), model_kwargs=model_kwargs, max_seq_length=max_length)
    modules = [transformer, Pooling(config.hidden_size, "mean"), Normalize()]
    return SentenceTransformer(modules=modules)  # type: ignore[arg-type]


def save_embedder(embedder: SentenceTransformer, folder: Path) -> None:
    """Write a model as a Sentence Transformers folder, and make sure that a LLARA model reads texts as before.

    Raises:
        LlamoryError: its tokenizer reads texts differently once it is loaded again.
    """
    embedder.save(str(folder), create_model_card=False)
    if is_llara(embedder):
        check_saved(folder, embedder)


def set_query_prompt(embedder: SentenceTransformer, query_prompt: str) -> None:
    """Let queries take the slots of another prompt (see `LlaraTemplate.query_prompt`); documents stay as they are.

    Raises:
        LlamoryError: the model is no LLARA model, or there is no such prompt.
    """
    template = _template(embedder)
    if template is None:
        raise LlamoryError("Only a LLARA model has a query_prompt; leave it out for this one.")
    new_template = dataclasses.replace(template, query_prompt=query_prompt)
    tokenizer: Any = embedder.tokenizer
    template_body = tokenizer.chat_template.removeprefix(query_prompt_line(template.query_prompt))
    if template_body == tokenizer.chat_template:
        raise LlamoryError("This model was exported before queries could have another prompt; export it again.")
    embedder[0].config.llara = new_template.to_dict()
    tokenizer.chat_template = query_prompt_line(query_prompt) + template_body
    if (router := whitening_router(embedder)) is not None:
        reroute(router, query_prompt)


def is_llara(embedder: SentenceTransformer) -> bool:
    """Whether a model's embeddings are those of LLARA's slots."""
    return _template(embedder) is not None


def query_prompt(embedder: SentenceTransformer) -> str | None:
    """Whose slots embed queries: "prediction" or "summary"; None for a model without slots."""
    template = _template(embedder)
    return None if template is None else template.query_prompt


def escape_slot_tokens(embedder: SentenceTransformer, texts: list[str]) -> list[str]:
    """Rewrite what a LLARA embedder refuses to read: a slot token such as `<s1>` in a text becomes `< s1>`.

    For texts whose writer couldn't know of slot tokens. Other embedders get their texts unchanged.
    """
    template = _template(embedder)
    if template is None:
        return texts
    reserved = {token: f"< {token[1:]}" for token in slot_tokens(template.slots)} | {SEGMENT_SEPARATOR: ""}
    hidden = []
    for text in texts:
        for token, replacement in reserved.items():
            text = text.replace(token, replacement)
        hidden.append(text)
    return hidden


def _resolve_name(model: str | Path) -> str:
    return PACKAGED_RETRIEVER if str(model) == "default" else str(model)


def _template(embedder: SentenceTransformer) -> LlaraTemplate | None:
    config: Any = getattr(embedder[0], "config", None)
    return LlaraTemplate.from_config(config) if getattr(config, "model_type", None) == "llama" else None
