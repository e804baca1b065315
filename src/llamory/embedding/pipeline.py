"""From a LLARA checkpoint to an embedder of stock Sentence Transformers modules: load, check, whiten, export.

The embedding of a text is the normalized mean of the last hidden states at the slot tokens (Li et al. 2023, section
3.3). Documents get the summary prompt, queries that or the prediction prompt. In an exported folder a chat template
writes the prompts, and word weights (1 for slot tokens, 0 for others) select the slots.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamory.common.io import PathLike, atomic_path
from llamory.embedding.encoder import FlatEncoder, escape_slot_tokens, is_llara, llara_template
from llamory.embedding.export_tokenizer import build_export_tokenizer, query_prompt_line
from llamory.embedding.whitening import Whitening, fit_whitening, pseudo_queries, route_mappings, whitening_router
from llamory.errors import LlamoryError
from llamory.llara.template import QUERY_PROMPTS, LlaraTemplate
from llamory.models import base as backbone
from llamory.models.adapters import load_shared

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerFast

DEFAULT_MAX_LENGTH = 512
PACKAGED_RETRIEVER = "retriever"  # the packaged adapter that "default" means here

# Texts on which the exported tokenizer must give the template's ids; each was wrong for some tokenizer.
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
_NO_CODE: dict[str, Any] = {key: {"trust_remote_code": False} for key in ("config_kwargs", "processor_kwargs")}
_TOKENIZER_ADVICE = "use a checkpoint with a byte-level BPE or a Llama-2 tokenizer."


def load_embedder(
    model: PathLike,
    *,
    max_length: int | None = None,
    device: str | None = None,
    query_prompt: str | None = None,
    shared: bool = False,
    whitened: bool = True,
    similarity: str = "cosine",
    **model_kwargs: Any,
) -> SentenceTransformer:
    """Load a model that turns texts into vectors.

    Args:
        model: "default" for the packaged retriever, a LLARA checkpoint or an adapter of one, a Sentence Transformers
            folder, or a hub id. Python code that comes with a model is never run.
        max_length: limit in tokens for a text with its prompt; by default 512 for a LLARA checkpoint (or its context,
            if that is less), else as the model's folder says.
        device: a torch device; by default the best there is.
        query_prompt: for a LLARA model, "prediction" or "summary"; by default as its template says.
        shared: for a LLARA adapter in float32: share the base model's weights, as `llamory.models.adapters` says.
        whitened: for a LLARA checkpoint, whether the whitening saved beside it is applied.
        similarity: for a LLARA checkpoint, the name of the similarity function.
        model_kwargs: passed to `from_pretrained`, such as `dtype` and `attn_implementation`.

    Raises LlamoryError if there is no such model, it is no retriever, or a setting doesn't fit it.
    """
    from sentence_transformers import SentenceTransformer

    name = _resolve_name(model)
    if _llama_config(name) is not None:
        checkpoint = _Checkpoint(name, max_length)
        embedder = checkpoint.build(device, similarity, model_kwargs, shared=shared)
        if whitened and (whitening := checkpoint.load_whitening()) is not None:
            add_whitening(embedder, whitening)
    else:
        with backbone.load_errors(name, "embedding model"):
            embedder = SentenceTransformer(name, device=device, trust_remote_code=False, model_kwargs=model_kwargs)
        if max_length is not None:
            embedder.max_seq_length = max_length
    if query_prompt is not None:
        set_query_prompt(embedder, query_prompt)
    return embedder


def check_embedder(model: PathLike) -> None:
    """Raise a LlamoryError, before long work starts, if a model doesn't exist or turns no texts into vectors."""
    name = _resolve_name(model)
    if (config := _llama_config(name)) is not None:
        _require_template(name, config)


def mean_embedder(
    model: PathLike, *, max_length: int = DEFAULT_MAX_LENGTH, device: str | None = None, **model_kwargs: Any
) -> SentenceTransformer:
    """A LLaMA (named as for `models.base.resolve`) as a baseline: the mean of a text's last hidden states."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    config, source = backbone.load_config(model), str(backbone.resolve(model))
    with backbone.load_errors(model, "model"):
        transformer = Transformer(source, model_kwargs=model_kwargs, max_seq_length=max_length, **_NO_CODE)
    modules = [transformer, Pooling(config.hidden_size, "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device=device)  # type: ignore[arg-type]


class _Checkpoint:
    """A LLARA checkpoint, or an adapter of one, before its weights are loaded: template, tokenizer and length fit."""

    def __init__(self, name: str, max_length: int | None):
        config: Any = backbone.load_config(name)
        if config.model_type != "llama":
            raise LlamoryError(f"{name} is a {config.model_type} model; only LLaMAs can be LLARA retrievers.")
        self.name, self.config, self.template = name, config, _require_template(name, config)
        self.tokenizer = backbone.load_tokenizer(name)
        self.template.check_tokenizer(self.tokenizer)
        context: int = config.max_position_embeddings
        self.max_length = min(DEFAULT_MAX_LENGTH, context) if max_length is None else max_length
        if self.max_length > context:
            problem = f"A length of {max_length} tokens exceeds the context of {name}, which is {context}"
            raise LlamoryError(f"{problem}; choose a smaller length.")
        # These raise if a prompt doesn't fit.
        self.template.encode(self.tokenizer, "", max_length=self.max_length, predict=False)
        self.template.encode(self.tokenizer, "", max_length=self.max_length, summarize=False)

    def build(
        self, device: str | None, similarity: str, model_kwargs: Mapping[str, Any], *, shared: bool
    ) -> SentenceTransformer:
        """Load the weights and put them into stock modules, without whitening."""
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modality import InputFormatter
        from sentence_transformers.base.modules.normalize import Normalize
        from sentence_transformers.base.modules.transformer import Transformer
        from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
        from sentence_transformers.util import get_device_name

        exported = build_export_tokenizer(self.tokenizer, self.template, self.max_length)
        forward = {"method": "forward", "method_output_name": "last_hidden_state"}
        with backbone.load_errors(self.name, "model"):
            transformer = Transformer(
                str(backbone.resolve(self.name)),
                model_kwargs=dict(model_kwargs),
                modality_config={"text": forward, "message": {**forward, "format": "flat"}},  # type: ignore[typeddict-item]
                module_output_name="token_embeddings",
                unpad_inputs=False,  # WordWeights reads the attention mask, which unpadded batches lack
                **_NO_CODE,
            )
        if backbone.adapter_folder(self.name) is not None:
            if shared and model_kwargs.get("dtype") in (None, "float32", torch.float32):
                adapted = load_shared(self.name, device=device or get_device_name(), **model_kwargs)
            else:
                adapted = backbone.load_model(self.name, **model_kwargs)
            transformer.model = adapted.model
        transformer.processor = exported
        transformer.input_formatter = InputFormatter("llama", message_format="flat", processor=exported)
        transformer.input_formatter.supported_modalities = list(transformer.modality_config)
        self._check_token_ids(transformer)
        weights = WordWeights(*_word_weights(exported, self.template, self.config.vocab_size), unknown_word_weight=0.0)
        modules = [transformer, weights, Pooling(self.config.hidden_size, "mean"), Normalize()]
        return SentenceTransformer(modules=modules, device=device, similarity_fn_name=similarity)  # type: ignore[arg-type]

    def load_whitening(self) -> Whitening | None:
        """The whitening saved beside the checkpoint, if there is one."""
        return Whitening.load(backbone.adapter_folder(self.name) or Path(self.name), self.config.hidden_size)

    def _check_token_ids(self, transformer: Any) -> None:
        """Check that the exported tokenizer reads texts as the template did in training."""
        for text in (*_CHECK_TEXTS, "one, two; three " * self.max_length):
            for task in ("query", "document", None):
                prompts = self.template.prompts(task)
                expected = self.template.encode(self.tokenizer, text, **prompts, max_length=self.max_length)
                found = transformer.preprocess([text], task=task)["input_ids"][0].tolist()
                if found != expected:
                    problem = f"it reads {text[:40]!r} otherwise than in training"
                    raise LlamoryError(f"This tokenizer can't be exported: {problem}; {_TOKENIZER_ADVICE}")


def _word_weights(
    tokenizer: PreTrainedTokenizerFast, template: LlaraTemplate, rows: int
) -> tuple[list[str], dict[str, float]]:
    """All tokens in the order of their ids, one per embedding row, and a weight of 1 for each slot token."""
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    vocabulary = [tokens.get(i, f"[unused {i}]") for i in range(max(rows, max(tokens) + 1))]
    weights = {vocabulary[i]: 1.0 for i in template.slot_ids}
    # WordWeights also looks words up in lower case: an ordinary token <S1> needs a weight of its own.
    weights |= {token: 0.0 for token in vocabulary if token not in weights and token.lower() in weights}
    return vocabulary, weights


def _resolve_name(model: PathLike) -> str:
    """The name of an embedder; a LlamoryError if it is a path without a model, or one whose modules need own code."""
    if backbone.packaged_name(model) == "default":
        return backbone.unshadowed_name(PACKAGED_RETRIEVER)
    name = model if isinstance(model, str) else str(Path(model).absolute())
    path = Path(name)
    if backbone.adapter_folder(name) is not None:
        return name
    if path.is_dir():
        if not backbone.holds_model(path):
            raise LlamoryError(f"{name} holds no model (there is no config.json); give a checkpoint's folder.")
        with backbone.load_errors(name, "modules.json"):
            _check_module_types(path)
    elif path.exists():
        raise LlamoryError(f"{name} is a file; give a checkpoint's folder.")
    elif path.is_absolute() or name.startswith((".", "~")):
        raise LlamoryError(f"There is no folder {name}; give the folder of a checkpoint.")
    return name


def _llama_config(name: str) -> Any:
    """The config of a LLaMA or an adapter of one; None for a Sentence Transformers folder and any other model."""
    from sentence_transformers.util import is_sentence_transformer_model
    from transformers import AutoConfig

    if backbone.adapter_folder(name) is not None:
        return backbone.load_config(name)
    if is_sentence_transformer_model(name):
        return None
    with backbone.load_errors(name, "model"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    return config if config.model_type == "llama" else None


def _check_module_types(folder: Path) -> None:
    types: list[Any] = []
    for file in folder.rglob("modules.json"):
        types += [module["type"] for module in json.loads(file.read_text(encoding="utf-8"))]
    for file in folder.rglob("router_config.json"):
        types += json.loads(file.read_text(encoding="utf-8")).get("types", {}).values()
    for module_type in map(str, types):
        if not module_type.startswith("sentence_transformers."):
            problem = f"{folder} has a module, {module_type}, that needs Python code that comes with the model"
            raise LlamoryError(f"{problem}, which llamory never runs; choose a model of stock modules.")


def _require_template(name: str, config: Any) -> LlaraTemplate:
    if (template := LlaraTemplate.from_config(config)) is None:
        problem = f"{name} is a plain LLaMA without a LLARA template in its config"
        raise LlamoryError(f"{problem}; train a retriever from it first with `llamory train llara`.")
    return template


def query_prompt(embedder: SentenceTransformer) -> str | None:
    """The prompt of queries, "prediction" or "summary"; None for a model without slots."""
    template = llara_template(embedder)
    return None if template is None else template.query_prompt


def set_query_prompt(embedder: SentenceTransformer, query_prompt: str) -> None:
    """Change the prompt of queries (see `LlaraTemplate.query_prompt`); documents keep theirs.

    Raises LlamoryError if the model is no LLARA model, or there is no such prompt.
    """
    if (template := llara_template(embedder)) is None:
        raise LlamoryError("Only a LLARA model has a query_prompt; leave it out for this one.")
    new_template = dataclasses.replace(template, query_prompt=query_prompt)
    tokenizer: Any = embedder.tokenizer
    template_body = tokenizer.chat_template.removeprefix(query_prompt_line(template.query_prompt))
    if template_body == tokenizer.chat_template:
        raise LlamoryError("This model was exported before queries could have another prompt; export it again.")
    embedder[0].config.llara = new_template.to_dict()
    tokenizer.chat_template = query_prompt_line(query_prompt) + template_body
    if (router := whitening_router(embedder)) is not None:
        router.route_mappings = route_mappings(query_prompt)


def sample_passages(
    model: PathLike, paths: PathLike | Sequence[PathLike], *, number: int = 1024, max_length: int = DEFAULT_MAX_LENGTH
) -> list[str]:
    """At most `number` random passages of documents, of `max_length` tokens with their prompt, to fit whitening on.

    Raises LlamoryError if the model is no LLARA checkpoint, or the documents can't be read or have no text.
    """
    from llamory.llara.data import load_examples, passage_texts  # needs the extra "train"

    name = _resolve_name(model)
    template, tokenizer = _require_template(name, backbone.load_config(name)), backbone.load_tokenizer(name)
    prompt = len(template.encode(tokenizer, "", max_length=max_length, predict=False))
    length = max_length - prompt + template.overhead()  # an example has both prompts
    examples = load_examples(paths, tokenizer, template, max_length=length, skip_broken=True, quiet=True)
    return passage_texts(examples, tokenizer, number)


def fit_whitening_on_texts(
    model: PathLike | SentenceTransformer,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    device: str | None = None,
) -> Whitening:
    """Fit whitening on a few hundred texts without labels, read as documents; their first words are read as queries.

    `model` is as for `load_embedder`, or an embedder without whitening.

    Raises LlamoryError if the model is no LLARA checkpoint, or there are fewer than `MIN_TEXTS` texts.
    """
    if isinstance(model, str | os.PathLike):
        model = load_embedder(model, max_length=max_length, device=device, whitened=False)
    texts = escape_slot_tokens(model, list(texts))
    documents, original_prompt = _encode(model, texts, "document"), query_prompt(model)
    queries = {}
    for prompt in QUERY_PROMPTS:
        set_query_prompt(model, prompt)
        queries[prompt] = _encode(model, pseudo_queries(texts), "query")
    set_query_prompt(model, str(original_prompt))
    return fit_whitening(documents, queries)


def add_whitening(embedder: SentenceTransformer, whitening: Whitening) -> None:
    """Append whitening to the modules of a LLARA embedder that has none."""
    embedder.extend([module.to(embedder.device) for module in whitening.modules(str(query_prompt(embedder)))])


def _encode(embedder: SentenceTransformer, texts: list[str], task: str) -> Tensor:
    encoder = FlatEncoder.from_embedder(embedder)
    return torch.as_tensor(embedder.encode(texts, task=task) if encoder is None else encoder.encode(texts, task))


def export_sentence_transformer(
    model: PathLike | SentenceTransformer,
    output: PathLike,
    *,
    max_length: int = DEFAULT_MAX_LENGTH,
    similarity: str = "cosine",
    query_prompt: str | None = None,
    whitening_texts: Sequence[str] = (),
    device: str = "cpu",
) -> Path:
    """Write a LLARA checkpoint as a Sentence Transformers folder that loads without llamory.

    Args:
        model: a LLARA checkpoint, an adapter of one, a hub id, or an embedder of `load_embedder` (then `max_length` and
            `similarity` are its own).
        output: the folder to write, which is returned; it may exist if it is empty.
        max_length: limit in tokens for a text with its prompt; longer texts are truncated, the prompt never is.
        similarity: name of the similarity function that the folder declares.
        query_prompt: "prediction" or "summary"; by default as the template says.
        whitening_texts: to fit whitening on; by default the whitening beside the checkpoint is used, if there is one.
        device: where the texts are embedded.

    Raises LlamoryError if the model is no LLARA checkpoint, its tokenizer doesn't fit, or the folder isn't empty.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise LlamoryError(f"{output} already exists and isn't an empty folder; choose another output folder.")
    if isinstance(model, str | os.PathLike):
        name = _resolve_name(model)
        checkpoint = _Checkpoint(name, max_length)
        embedder = checkpoint.build(device, similarity, {}, shared=False)
        if whitening_texts:
            add_whitening(embedder, fit_whitening_on_texts(embedder, whitening_texts))
        elif (whitening := checkpoint.load_whitening()) is not None:
            add_whitening(embedder, whitening)
    else:
        embedder = model
    if query_prompt is not None:
        set_query_prompt(embedder, query_prompt)
    with atomic_path(output) as temporary:
        save_embedder(embedder, temporary)
        if output.exists():
            output.rmdir()
    return output


def save_embedder(embedder: SentenceTransformer, folder: Path) -> None:
    """Write an embedder as a Sentence Transformers folder.

    Raises LlamoryError if a LLARA model's tokenizer reads texts differently when it is loaded again.
    """
    from transformers import AutoTokenizer

    embedder.save(str(folder), create_model_card=False)
    if not is_llara(embedder):
        return
    saved = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    for text in _CHECK_TEXTS:
        message = [{"role": "user", "content": text}]
        if saved.apply_chat_template(message) != embedder.tokenizer.apply_chat_template(message):
            problem = f"once saved and loaded again it reads {text[:40]!r} differently"
            raise LlamoryError(f"This tokenizer can't be exported: {problem}; {_TOKENIZER_ADVICE}")
