"""The stock modules that make an embedder of a LLARA checkpoint, and the checks that it must pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.embedding.export_tokenizer import build_export_tokenizer
from llamory.embedding.whitening import Whitening
from llamory.errors import LlamoryError
from llamory.llara.template import LlaraTemplate
from llamory.models import base as backbone
from llamory.models.adapters import load_shared

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

DEFAULT_MAX_LENGTH = 512

# Texts on which the exported tokenizer must give the template's ids; each has been a way to go wrong.
_CHECK_TEXTS = (
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


def build_sentence_transformer(
    name: str,
    max_length: int | None,
    *,
    device: str | None,
    similarity: str = "cosine",
    model_kwargs: Mapping[str, Any] | None = None,
    whitened: bool = True,
    shared: bool = False,
) -> SentenceTransformer:
    """Load a LLARA checkpoint as Sentence Transformers modules and make sure that they read texts as training did.

    Args:
        name: the checkpoint, or an adapter that brings its template.
        max_length: limit in tokens for a text with its prompt; by default 512, or what the model can read.
        device: a torch device; by default the best there is.
        similarity: name of the similarity function.
        model_kwargs: further arguments of `from_pretrained`.
        whitened: with the whitening that lies beside it, if there is one.
        shared: of an adapter, with the base model's weights that are in RAM already, in float32 (`models.adapters`).

    Raises:
        LlamoryError: the model is no LLARA checkpoint, its tokenizer doesn't fit, or the length doesn't.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modality import InputFormatter
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

    check_folder(name)
    adapter = backbone.adapter_folder(name)
    config = _read_config(name)
    if config.model_type != "llama":
        raise LlamoryError(f"{name} is a {config.model_type} model; only LLaMA checkpoints can be LLARA retrievers.")
    template = require_template(name, config)
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

    exported = build_export_tokenizer(tokenizer, template, max_length)
    forward = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = Transformer(
        name if adapter is None else str(backbone.resolve(name)),
        model_kwargs=dict(model_kwargs or {}),
        modality_config={"text": forward, "message": {**forward, "format": "flat"}},  # type: ignore[typeddict-item]
        module_output_name="token_embeddings",
        unpad_inputs=False,  # WordWeights reads the attention mask, which unpadded batches don't have
    )
    if adapter is not None:
        transformer.model = _load_adapted_model(name, shared, device, dict(model_kwargs or {}))
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
    if whitened and (whitening := Whitening.load(adapter or Path(name), config.hidden_size)) is not None:
        modules += whitening.modules(template.query_prompt)
    return SentenceTransformer(modules=modules, device=device, similarity_fn_name=similarity)  # type: ignore[arg-type]


def _load_adapted_model(name: str, shared: bool, device: str | None, model_kwargs: dict[str, Any]) -> Any:
    import torch
    from sentence_transformers.util import get_device_name

    if not shared or model_kwargs.get("dtype") not in (None, "float32", torch.float32):
        return backbone.load_model(name, **model_kwargs).model
    model_kwargs.pop("dtype", None)
    return load_shared(name, device=device or get_device_name(), **model_kwargs).model


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


def _check_texts(max_length: int) -> Iterator[str]:
    yield from _CHECK_TEXTS
    yield "one, two; three " * max_length


def _check_token_ids(
    transformer: Any, tokenizer: PreTrainedTokenizerBase, template: LlaraTemplate, max_length: int
) -> None:
    for text in _check_texts(max_length):
        for task in ("query", "document", None):
            expected = template.encode(tokenizer, text, **template.prompts(task), max_length=max_length)
            found = transformer.preprocess([text], task=task)["input_ids"][0].tolist()
            if found != expected:
                raise LlamoryError(
                    f"This tokenizer can't be exported: with the prompts around it, {text[:40]!r} gets other token "
                    "ids than in training; use a checkpoint with a byte-level BPE or a Llama-2 tokenizer."
                )


def check_saved(folder: Path, embedder: SentenceTransformer) -> None:
    """Make sure that the tokenizer survived saving, as transformers rebuilds some of them when they are loaded."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(str(folder))
    for text in _CHECK_TEXTS:
        message = [{"role": "user", "content": text}]
        if loaded.apply_chat_template(message) != embedder.tokenizer.apply_chat_template(message):
            raise LlamoryError(
                f"This tokenizer can't be exported: once saved and loaded again it reads {text[:40]!r} differently; "
                "use a checkpoint with a byte-level BPE or a Llama-2 tokenizer."
            )


def llama_config(name: str) -> Any:
    """The config of a LLaMA or an adapter of one; None for a Sentence Transformers folder and any other model."""
    from sentence_transformers.util import is_sentence_transformer_model

    if backbone.adapter_folder(name) is None and is_sentence_transformer_model(name):
        return None
    config = _read_config(name)
    return config if config.model_type == "llama" else None


def check_folder(name: str) -> None:
    """See that a name that can only be a folder's is that of a model's folder.

    Raises:
        LlamoryError: it isn't.
    """
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
        raise LlamoryError(f"{name} can't be loaded as a model: {first_line(error)}.") from error


def require_template(name: str, config: Any) -> LlaraTemplate:
    """The template of a model's config.

    Raises:
        LlamoryError: it has none, so the model wasn't trained to embed.
    """
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
        raise LlamoryError(f"The tokenizer of {name} can't be loaded: {first_line(error)}.") from error


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
