"""LLARA as an embedding model: a trained checkpoint becomes a Sentence Transformers folder of stock modules.

The embedding of a text is the mean of the last hidden states at the slot tokens, normalised (Li et al. 2023, section
3.3). Documents take the summary prompt, queries that or the prediction prompt. The folder needs nothing but Sentence
Transformers: a chat template writes the prompts, and word weights of 1 for slots and 0 for all else pick the slots.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory import backbone
from llamory.errors import LlamoryError
from llamory.llara.piecewise import MARKER, piecewise_tokenizer, query_prompt_line
from llamory.llara.template import LlaraTemplate, slot_tokens

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DEFAULT_MAX_LENGTH = 512
PACKAGED = "retriever"  # the adapter that "default" means

# Texts on which the exported tokenizer must give the template's ids; each has been a way to go wrong.
_PROBES = (
    "",
    "A plain sentence about rivers.",
    " leading and trailing space ",
    "\n\tlines\r\n\n",
    "   ",
    '"quoted", and ends with a quote"',
    "ends with a comma,",
    "https://example.org/picture.png",
    "def f(x):\n    return x[0] != '\\n'  # {{ braces }} {% and %}",
    "naïve café e\u0301 — 日本語のテキスト 🦙🏽",
)


def export_sentence_transformer(
    model: str | Path,
    output: str | Path,
    *,
    max_length: int = DEFAULT_MAX_LENGTH,
    similarity: str = "cosine",
    query_prompt: str | None = None,
) -> Path:
    """Write a LLARA checkpoint as a Sentence Transformers folder that loads without llamory.

    `encode_document` and `encode` read the summary prompt's slots, `encode_query` those of its own prompt.

    Args:
        model: a checkpoint folder, as transformers saves it, with its tokenizer and its template in `config.llara`; or
            the hub id of one.
        output: the folder to make; it may exist if it is empty.
        max_length: limit in tokens for a text with its prompt; longer texts are cut, the prompt never is.
        similarity: name of the similarity function that the folder declares.
        query_prompt: "prediction" or "summary"; by default what the checkpoint says.

    Returns:
        The output folder.

    Raises:
        LlamoryError: the model is no LLARA checkpoint, its tokenizer doesn't fit, or the output folder isn't empty.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LlamoryError(f"{output} already exists and isn't an empty folder; choose another output folder.")
    embedder = _assemble(_named(model), max_length, device="cpu", similarity=similarity)
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


def check_embedder(model: str | Path) -> None:
    """See, before long work starts, that there is such a model and that it turns texts into vectors.

    Raises:
        LlamoryError: there isn't, or it doesn't.
    """
    name = _named(model)
    _check_folder(name)
    if (config := _llama_config(name)) is not None:
        _template_of(name, config)


def load_embedder(
    model: str | Path,
    *,
    max_length: int | None = None,
    device: str | None = None,
    query_prompt: str | None = None,
    **loading: Any,
) -> SentenceTransformer:
    """Load a model that turns texts into vectors.

    Args:
        model: "default" for the packaged adapter of SmolLM2-135M, a LLARA checkpoint or an adapter of one, a Sentence
            Transformers folder, or a hub id.
        max_length: limit in tokens for a text with its prompt; by default 512 for a LLARA checkpoint (or what it can
            read, if that is less), else what the folder says.
        device: a torch device; by default the best there is.
        query_prompt: of a LLARA model, "prediction" or "summary"; by default what the model says.
        loading: further arguments of `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises:
        LlamoryError: there is no such model, it is a LLaMA that wasn't trained to embed, or it has no such prompt.
    """
    embedder = _load_embedder(_named(model), max_length, device, loading)
    if query_prompt is not None:
        set_query_prompt(embedder, query_prompt)
    return embedder


def _load_embedder(
    name: str, max_length: int | None, device: str | None, loading: Mapping[str, Any]
) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    _check_folder(name)
    if _llama_config(name) is not None:
        return _assemble(name, max_length, device=device, loading=loading)
    try:
        embedder = SentenceTransformer(name, device=device, model_kwargs=dict(loading))
    except (OSError, ValueError) as error:
        raise LlamoryError(f"{name} can't be loaded as an embedding model: {_first_line(error)}.") from error
    if max_length is not None:
        embedder.max_seq_length = max_length
    return embedder


def mean_embedder(model: str | Path, *, max_length: int = DEFAULT_MAX_LENGTH, **loading: Any) -> SentenceTransformer:
    """A LLaMA that wasn't trained to embed, as it is: the mean of the last hidden states of a text's tokens.

    What trained retrievers are compared with. Arguments as for `load_embedder`; the model is named as for
    `llamory.backbone.resolve`, so that "default" is the packaged base model.

    Raises:
        LlamoryError: there is no such LLaMA.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    config = backbone.load_config(model)
    transformer = Transformer(str(backbone.resolve(model)), model_kwargs=loading, max_seq_length=max_length)
    modules = [transformer, Pooling(config.hidden_size, "mean"), Normalize()]
    return SentenceTransformer(modules=modules)  # type: ignore[arg-type]


def save_embedder(embedder: SentenceTransformer, folder: Path) -> None:
    """Write a model as a Sentence Transformers folder, and make sure that a LLARA model reads texts as before.

    Raises:
        LlamoryError: its tokenizer reads texts differently once it is loaded again.
    """
    embedder.save(str(folder), create_model_card=False)
    if reads_slots(embedder):
        _check_saved(folder, embedder)


def set_query_prompt(embedder: SentenceTransformer, query_prompt: str) -> None:
    """Let queries take the slots of another prompt (see `LlaraTemplate.query_prompt`); documents stay as they are.

    Raises:
        LlamoryError: the model is no LLARA model, or there is no such prompt.
    """
    template = _template(embedder)
    if template is None:
        raise LlamoryError("Only a LLARA model has a query_prompt; leave it out for this one.")
    wanted = dataclasses.replace(template, query_prompt=query_prompt)
    tokenizer: Any = embedder.tokenizer
    written = tokenizer.chat_template.removeprefix(query_prompt_line(template.query_prompt))
    if written == tokenizer.chat_template:
        raise LlamoryError("This model was exported before queries could have another prompt; export it again.")
    embedder[0].config.llara = wanted.to_dict()
    tokenizer.chat_template = query_prompt_line(query_prompt) + written


def reads_slots(embedder: SentenceTransformer) -> bool:
    """Whether a model's embeddings are those of LLARA's slots."""
    return _template(embedder) is not None


def query_prompt(embedder: SentenceTransformer) -> str | None:
    """Whose slots embed queries: "prediction" or "summary"; None for a model without slots."""
    template = _template(embedder)
    return None if template is None else template.query_prompt


def hide_slot_tokens(embedder: SentenceTransformer, texts: list[str]) -> list[str]:
    """Rewrite what a LLARA embedder refuses to read: a slot token such as `<s1>` in a text becomes `< s1>`.

    For texts whose writer couldn't know of slot tokens. Other embedders get their texts unchanged.
    """
    template = _template(embedder)
    if template is None:
        return texts
    reserved = {token: f"< {token[1:]}" for token in slot_tokens(template.slots)} | {MARKER: ""}
    hidden = []
    for text in texts:
        for token, replacement in reserved.items():
            text = text.replace(token, replacement)
        hidden.append(text)
    return hidden


# ---- putting the modules together ------------------------------------------------------------------------------------


def _assemble(
    name: str,
    max_length: int | None,
    *,
    device: str | None,
    similarity: str = "cosine",
    loading: Mapping[str, Any] | None = None,
) -> SentenceTransformer:
    """Load a LLARA checkpoint as Sentence Transformers modules and make sure that they read texts as training did."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import InputFormatter
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

    _check_folder(name)
    adapter = backbone.adapter_folder(name)
    config = _read_config(name)
    if config.model_type != "llama":
        raise LlamoryError(f"{name} is a {config.model_type} model; only LLaMA checkpoints can be LLARA retrievers.")
    template = _template_of(name, config)
    tokenizer = _read_tokenizer(name)
    template.check_tokenizer(tokenizer)
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, config.max_position_embeddings)
    if max_length > config.max_position_embeddings:
        raise LlamoryError(
            f"A length of {max_length} tokens is more than the {config.max_position_embeddings} that {name} can read; "
            "choose a smaller length."
        )
    template.encode(tokenizer, "", max_length=max_length, predict=False)  # raises where prompts leave no room
    template.encode(tokenizer, "", max_length=max_length, summarize=False)

    exported = piecewise_tokenizer(tokenizer, template, max_length)
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = Transformer(
        name if adapter is None else str(backbone.resolve(name)),
        model_kwargs=dict(loading or {}),
        modality_config={"text": forward, "message": {**forward, "format": "flat"}},  # type: ignore[typeddict-item]
        module_output_name="token_embeddings",
        unpad_inputs=False,  # WordWeights reads the attention mask, which unpadded batches don't have
    )
    if adapter is not None:
        transformer.model = backbone.load_model(name, **dict(loading or {})).model
    transformer.processor = exported
    transformer.input_formatter = InputFormatter("llama", message_format="flat", processor=exported)
    transformer.input_formatter.supported_modalities = list(transformer.modality_config)
    _check_token_ids(transformer, tokenizer, template, max_length)

    vocabulary, weights = _word_weights(exported, template, config.vocab_size)
    modules = [
        transformer,
        WordWeights(vocabulary, weights, unknown_word_weight=0.0),
        Pooling(config.hidden_size, "mean"),
        Normalize(),
    ]
    return SentenceTransformer(modules=modules, device=device, similarity_fn_name=similarity)  # type: ignore[arg-type]


def _word_weights(
    tokenizer: PreTrainedTokenizerFast, template: LlaraTemplate, rows: int
) -> tuple[list[str], dict[str, float]]:
    """All tokens in the order of their ids, one per embedding row, and a weight of 1 for each slot token."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    vocabulary = [tokens.get(i, f"[unused {i}]") for i in range(max(rows, max(tokens) + 1))]
    weights = {vocabulary[i]: 1.0 for i in template.summarize_slot_ids + template.predict_slot_ids}
    # WordWeights looks a word up in lower case too, so an ordinary token <S1> must be told apart from <s1>.
    weights |= {token: 0.0 for token in vocabulary if token not in weights and token.lower() in weights}
    return vocabulary, weights


# ---- checks ----------------------------------------------------------------------------------------------------------


def _probes(max_length: int) -> Iterator[str]:
    yield from _PROBES
    yield "one, two; three " * max_length


def _check_token_ids(
    transformer: Any, tokenizer: PreTrainedTokenizerBase, template: LlaraTemplate, max_length: int
) -> None:
    for probe in _probes(max_length):
        for task in ("query", "document", None):
            expected = template.encode(tokenizer, probe, **template.prompts(task), max_length=max_length)
            found = transformer.preprocess([probe], task=task)["input_ids"][0].tolist()
            if found != expected:
                raise LlamoryError(
                    f"This tokenizer can't be exported: with the prompts around it, {probe[:40]!r} gets other token "
                    "ids than in training; use a checkpoint with a byte-level BPE or a Llama-2 tokenizer."
                )


def _check_saved(folder: Path, embedder: SentenceTransformer) -> None:
    """Make sure that the tokenizer survived saving, as transformers rebuilds some of them when they are loaded."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder))
    for probe in _PROBES:
        message = [{"role": "user", "content": probe}]
        if loaded.apply_chat_template(message) != embedder.tokenizer.apply_chat_template(message):
            raise LlamoryError(
                f"This tokenizer can't be exported: once saved and loaded again it reads {probe[:40]!r} differently; "
                "use a checkpoint with a byte-level BPE or a Llama-2 tokenizer."
            )


def _named(model: str | Path) -> str:
    return PACKAGED if str(model) == "default" else str(model)


def _llama_config(name: str) -> Any:
    """The config of a LLaMA or an adapter of one; None for a Sentence Transformers folder and any other model."""
    from sentence_transformers.util import is_sentence_transformer_model

    if backbone.adapter_folder(name) is None and is_sentence_transformer_model(name):
        return None
    config = _read_config(name)
    return config if config.model_type == "llama" else None


def _check_folder(name: str) -> None:
    path = Path(name)
    if backbone.adapter_folder(name) is not None:
        return
    if path.is_dir():
        if not any((path / marker).exists() for marker in ("modules.json", "config.json", "adapter_config.json")):
            raise LlamoryError(f"{name} holds no model (there is no config.json); give a checkpoint's folder.")
    elif path.exists():
        raise LlamoryError(f"{name} is a file; give a checkpoint's folder.")
    elif path.is_absolute() or name.startswith((".", "~")):
        raise LlamoryError(f"There is no folder {name}; give the folder of a checkpoint.")


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    if backbone.adapter_folder(name) is not None:
        return backbone.load_config(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LlamoryError(f"{name} can't be loaded as a model: {_first_line(error)}.") from error


def _template_of(name: str, config: Any) -> LlaraTemplate:
    template = LlaraTemplate.from_config(config)
    if template is None:
        raise LlamoryError(
            f"{name} is a plain LLaMA without a LLARA template in its config; train a retriever from it first with "
            "`llamory train llara`."
        )
    return template


def _read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if backbone.adapter_folder(name) is not None:
        return backbone.load_tokenizer(name)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise LlamoryError(f"The tokenizer of {name} can't be loaded: {_first_line(error)}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _template(embedder: SentenceTransformer) -> LlaraTemplate | None:
    config: Any = getattr(embedder[0], "config", None)
    return LlaraTemplate.from_config(config) if getattr(config, "model_type", None) == "llama" else None
