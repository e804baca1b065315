"""Settings of the training commands: each field is a flag and a YAML key with type, default, bounds and help text.

Values are checked when settings are made. This module imports no torch, so that help pages stay fast.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from llamory.errors import LlamoryError

Class = TypeVar("Class", bound=type)
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy takes
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Accuracy = Annotated[float, Field(gt=0, le=1)]

LLARA_LOSSES = ("ar", "summarize", "predict")
_BOUNDS = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
}


def _increasing(values: list[int]) -> list[int]:
    if values != sorted(set(values)):
        raise ValueError("must increase from small to large")
    return values


def _known_losses(values: list[str]) -> list[str]:
    if not values or not set(values) <= set(LLARA_LOSSES):
        raise ValueError(f"must name at least one of {', '.join(LLARA_LOSSES)}")
    return values


Increasing = Annotated[list[Count], AfterValidator(_increasing)]


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def _settings(cls: Class) -> Class:
    """Make a dataclass whose constructor raises `LlamoryError` for a value out of bounds."""
    checked: Any = dataclass(cls, kw_only=True, config=ConfigDict(extra="forbid"))
    constructor = checked.__init__

    @functools.wraps(constructor)
    def init(self: Any, **values: Any) -> None:
        try:
            constructor(self, **values)
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:  # a check of several fields together
                raise LlamoryError(str(first["ctx"]["error"])) from None
            raise LlamoryError(f"{first['loc'][0]} {describe_problem(first)}.") from None

    checked.__init__ = init
    return checked  # type: ignore[no-any-return]


def describe_problem(error: Mapping[str, Any]) -> str:
    """What is wrong with a value, to follow the name of its setting; `error` is one of pydantic's error entries."""
    context = error.get("ctx", {})
    if error["type"] == "value_error":
        return f"{context['error']}, not {error['input']!r}"
    if error["type"] == "missing":
        return "must be given"
    if error["type"] in _BOUNDS:
        return f"must be {_BOUNDS[error['type']].format(**context)}, not {error['input']!r}"
    return f"is invalid: {error['msg']}"


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@_settings
class RunSettings:
    """Settings of every training run."""

    output: str = _required("Folder for checkpoints and the trained model.")

    steps: Count | None = _setting(None, "Optimisation steps.")
    batch_size: Count = _setting(8, "Rows per device and forward pass.")
    accumulation: Count = _setting(1, "Forward passes per optimisation step.")
    learning_rate: Positive = _setting(1e-5, "Peak learning rate.")
    scheduler: str = _setting("linear", "Learning-rate schedule (a name that transformers knows).")
    warmup: NonNegative = _setting(0.1, "Fraction of the steps (below 1) or number of steps of learning-rate warm-up.")
    weight_decay: NonNegative = _setting(0.0, "Weight decay.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = _setting(0.999, "AdamW's beta2.")
    max_grad_norm: NonNegative = _setting(1.0, "Gradients are clipped to this norm; 0 for no clipping.")
    seed: Seed = _setting(42, "Random seed.")

    bf16: bool = _setting(False, "Compute in bfloat16 (weights stay in float32).")
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass to save memory.")
    attn_implementation: str | None = _setting(None, "Attention: sdpa, flash_attention_2, flex_attention, eager.")
    fsdp: bool = _setting(False, "Shard weights over the processes (FSDP) instead of copying them (DDP).")
    cpu: bool = _setting(False, "Train on the CPU even if there is an accelerator.")

    log_every: Count = _setting(10, "Steps between logged losses.")
    save_every: Count = _setting(500, "Steps between checkpoints.")
    eval_every: Count | None = _setting(None, "Steps between evaluations; default: at every checkpoint.")
    keep_checkpoints: Count = _setting(2, "Checkpoints to keep (at least 2, so that one is always complete).")
    report_to: list[str] = _setting([], "Experiment trackers, such as tensorboard or wandb.")
    resume: bool = _setting(False, "Resume from the latest complete checkpoint in output.")
    quiet: bool = _setting(False, "No progress bar.")


@_settings
class AdaptSettings(RunSettings):
    """Settings of the runs that adapt a model to documents."""

    data: list[str] = _required("Files and folders of documents (txt, md, rst, html, py, jsonl).")
    model: str = _setting("default", "A LLaMA: folder, .gguf file, hub id, or 'default' for the packaged SmolLM2-135M.")
    skip_broken: bool = _setting(False, "Skip broken lines and files with a warning instead of stopping.")
    eval_data: list[str] = _setting([], "Files and folders for evaluation.")

    lora: bool = _setting(False, "Train low-rank adapters instead of the weights.")
    lora_rank: Count = _setting(64, "Rank of the adapters.")
    lora_alpha: Positive = _setting(16.0, "Scale of the adapters (divided by the rank).")
    lora_dropout: Fraction = _setting(0.1, "Dropout on the adapters' input.")
    lora_targets: list[str] = _setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Layers that get adapters."
    )


@_settings
class LlaraSettings(AdaptSettings):
    """Settings of LLARA pretraining. Defaults follow the paper (Li et al. 2023, section 4) where it gives them."""

    data: list[str] = _required("Documents (txt, md, rst, html, py, jsonl), or the published JSONL; files and folders.")
    output: str = _required("Folder for checkpoints, the trained model and its Sentence Transformers export.")
    eval_data: list[str] = _setting([], "Files and folders for evaluation; default: eval_fraction of the data.")
    steps: Count | None = _setting(None, "Optimisation steps; default: as many as epochs take.")
    batch_size: Count = _setting(8, "Passages per device and forward pass.")
    lora: bool = _setting(False, "Train low-rank adapters and the slot tokens' embeddings instead of all weights.")

    slots: Count = _setting(8, "Slot tokens per prompt.")
    prediction_sees_summary: bool = _setting(False, "Let the prediction slots attend to the summary slots.")
    losses: Annotated[list[str], AfterValidator(_known_losses)] = _setting(
        list(LLARA_LOSSES), "Next token (ar); bag of words of the summary (summarize), of the next passage (predict)."
    )
    bow_weighting: Literal["fixed", "learned"] = _setting("fixed", "How the bag-of-words losses are weighted.")
    bow_weight: NonNegative = _setting(0.1, "Weight of the bag-of-words losses (the published code divides by 10).")
    query_prompt: Literal["prediction", "summary"] = _setting(
        "summary", "Prompt that embeds queries in the exported model (paper: prediction; summary is better unlabelled)."
    )

    max_length: Count = _setting(1024, "Maximum sequence length in tokens, prompts included.")
    chunk_size: Count | None = _setting(None, "Tokens of the passages cut from documents; default: what fits.")
    languages: list[str] = _setting(["en"], "Languages whose stop words are excluded from bag-of-words targets.")
    text_field: str = _setting("text", "Field that holds the text in JSONL documents.")
    streaming: bool = _setting(False, "Read the data during training instead of preparing it first (needs steps).")
    num_proc: Count | None = _setting(None, "Processes that prepare the data.")
    workers: CountOrZero = _setting(0, "Processes that load batches.")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = _setting(0.0, "Fraction of the examples used for evaluation.")
    epochs: Positive = _setting(1.0, "Passes over the data; steps takes precedence.")
    export: bool = _setting(True, "Write a Sentence Transformers folder after training.")
    whiten: CountOrZero = _setting(0, "Passages to fit whitening of the embeddings on after training; 0 for none.")
    max_seq_length: Count = _setting(512, "Maximum sequence length of the exported embedder, prompts included.")

    @model_validator(mode="after")
    def _check(self) -> LlaraSettings:
        if self.streaming and self.steps is None:
            raise LlamoryError("Streamed data has no known length; set steps.")
        if self.streaming and self.eval_fraction:
            raise LlamoryError("eval_fraction needs data that is not streamed; set eval_data instead.")
        return self


@_settings
class RetrieverSettings(AdaptSettings):
    """Settings of training a retriever on queries and documents."""

    data: list[str] = _required("JSONL (query, pos, neg, pos_scores, neg_scores): files and folders; BEIR folders.")
    output: str = _required("Folder for checkpoints and the trained model, a Sentence Transformers folder.")
    model: str = _setting("default", "A LLARA or Sentence Transformers folder, a LLaMA, 'default' or 'retriever'.")
    eval_data: list[str] = _setting([], "Data of the same formats whose loss is logged.")
    split: str = _setting("train", "Split of BEIR folders to train on: qrels/SPLIT.tsv.")
    eval_split: str = _setting("dev", "Split of BEIR folders in eval_data.")

    steps: Count | None = _setting(None, "Optimisation steps; default: as many as epochs take.")
    epochs: Positive = _setting(1.0, "Passes over the queries; steps takes precedence.")
    batch_size: Count = _setting(32, "Queries per device and step; each other query's documents are negatives.")
    learning_rate: Positive = _setting(2e-5, "Peak learning rate.")

    cache: bool = _setting(True, "Process the batch in mini-batches (GradCache), so that memory allows any batch size.")
    mini_batch: Count = _setting(8, "Texts per forward pass with cache.")
    share_negatives: bool = _setting(True, "Use the documents of all processes as negatives.")
    temperature: Positive = _setting(0.01, "Cosine similarities are divided by this.")
    group_size: Count = _setting(8, "Documents per query: one positive, the others negatives, as far as available.")
    matryoshka: list[int] = _setting([], "Smaller embedding dimensions to train as well (Matryoshka loss).")

    mine: CountOrZero = _setting(0, "Hard negatives to mine per query before training; 0 for none.")
    mine_with: str | None = _setting(None, "Model that mines; default: the model before training.")
    mine_skip: CountOrZero = _setting(0, "Top-ranked documents that are never mined.")
    mine_depth: Count | None = _setting(None, "Documents per query to mine from; default: 10 per mined negative.")
    mine_margin: float = _setting(0.05, "Minimum relative margin of a negative's score below the positive's; -1: none.")

    distill: Literal["auto", "off", "kl", "margin_mse"] = _setting(
        "auto", "Loss on a teacher's scores; auto: kl, if every query's documents have scores."
    )
    distill_weight: NonNegative = _setting(1.0, "Weight of the loss on the teacher's scores.")
    contrastive_weight: NonNegative = _setting(1.0, "Weight of the contrastive loss with a teacher.")
    teacher_temperature: Positive = _setting(1.0, "The teacher's scores are divided by this.")

    max_query_length: Count | None = _setting(None, "Tokens of a query with prompt; default: max_passage_length.")
    max_passage_length: Count | None = _setting(None, "Tokens of a document with prompt; default: the model's, or 512.")
    query_prompt: Literal["prediction", "summary"] | None = _setting(
        None, "Prompt that embeds queries; default: the model's, prediction for a LLaMA without slots."
    )
    slots: Count = _setting(8, "Slot tokens per prompt, for a LLaMA that has none.")
    workers: CountOrZero = _setting(0, "Processes that load batches.")

    @model_validator(mode="after")
    def _check(self) -> RetrieverSettings:
        minimum, distill = self.mine_skip + self.mine, self.distill in ("kl", "margin_mse")
        if self.mine_depth is not None and self.mine_depth < minimum:
            raise LlamoryError(f"mine_depth must be at least mine_skip + mine, {minimum}, not {self.mine_depth}.")
        if self.mine and distill:
            raise LlamoryError("Mined negatives have no teacher scores; set mine to 0 or distill to off.")
        if distill and self.group_size < 2:
            raise LlamoryError("distill compares documents of a query; set group_size to at least 2.")
        if self.fsdp:
            raise LlamoryError("The retriever does not support fsdp; leave it out (each device holds the whole model).")
        return self


@_settings
class MemorySettings(AdaptSettings):
    """Settings of the runs that train memory layers. A step reads accumulation × processes independent streams."""

    proportions: list[float] = _setting([], "Fraction of tokens or examples from each entry of data.")
    eval_batches: Count = _setting(8, "Batches of eval_data to evaluate on.")

    teacher: str | None = _setting(
        None, "Model, usually the initial one, whose predictions without memory are distilled to keep them as good."
    )
    teacher_weight: NonNegative = _setting(1.0, "Weight of the divergence from the teacher.")
    teacher_rows: Count = _setting(4, "Rows of each forward pass that are compared with the teacher, in turn.")

    mem_layers: list[int] = _setting([], "Memory layers; default: the model's own, or three as in the published ones.")
    trainable: Literal["all", "memory_layers", "memory_projections"] = _setting(
        "all",
        "Weights to train: all; the attention of memory layers (memory_layers); or separate projections for memory "
        "(memory_projections; behaviour without memory is unchanged). LoRA is applied to the same.",
    )
    negative_weight: list[float] = _setting(
        [], "Minimum and maximum weight of negatives in the softmax, log-uniform per row: simulates a larger memory."
    )
    memory_size_bias: Fraction | None = _setting(
        None, "Fraction of ln(memory size / start) subtracted from memory logits; default: the model's own, or 0."
    )


@_settings
class FotSettings(MemorySettings):
    """Settings of FoT training. Defaults follow the published 3B model (Tworkowski et al. 2023) where it gives them."""

    eval_data: list[str] = _setting([], "Held-out files and folders: the loss with and without memory is logged.")
    steps: Count | None = _setting(1000, "Optimisation steps.")
    batch_size: Count = _setting(16, "Rows per device and forward pass; they can attend to one another.")
    learning_rate: Positive = _setting(2e-5, "Peak learning rate.")
    scheduler: str = _setting("constant_with_warmup", "Learning-rate schedule (a name that transformers knows).")
    warmup: NonNegative = _setting(0.02, "Fraction of the steps (below 1) or number of steps of learning-rate warm-up.")
    weight_decay: NonNegative = _setting(0.01, "Weight decay.")

    row_length: Annotated[int, Field(ge=2)] = _setting(2048, "Tokens of a row, which become the model's context.")
    dataset_packing: Count = _setting(4, "Consecutive rows that hold consecutive chunks of one document.")
    min_length: Count | None = _setting(None, "Minimum tokens of a document; default: row_length. 1 joins short ones.")
    text_field: str = _setting("text", "Field that holds the text in JSONL documents.")
    shuffle_buffer: CountOrZero = _setting(256, "Documents per source that are shuffled together; 0 for none.")

    crossbatch_schedule: list[str] = _setting(
        [],
        "Contexts of a row: POSITIVES+NEGATIVES for each equal part of the batch, or the published '3b' or '7b'; "
        "default: 3b, if there is no cross_batch_range.",
    )
    cross_batch_range: CountOrZero | None = _setting(
        None, "Instead of a crossbatch_schedule: number of preceding rows that each row attends to."
    )
    crossbatch_stepping: bool = _setting(False, "With cross_batch_range: later chunks of a document see more rows.")
    schedule: Literal["constant", "sampled", "curriculum"] = _setting(
        "constant", "Number of contexts: constant, sampled from sizes for each step, or increasing through sizes."
    )
    sizes: list[int] = _setting([], "Numbers of contexts (negatives, with a crossbatch_schedule) of the schedule.")
    advance_at_accuracy: Accuracy = _setting(0.98, "Training accuracy at which a curriculum advances to the next size.")
    negatives: Literal["random", "similar"] = _setting(
        "random", "Other documents that a row attends to: random, or the nearest by the retriever."
    )
    retriever: str | None = _setting(None, "Model that finds similar negatives: Sentence Transformers or LLARA.")


@_settings
class InstructSettings(MemorySettings):
    """Settings of instruction tuning. Defaults are those of the published LongLLaMA-Instruct-3Bv1.1."""

    data: list[str] = _required(
        "JSON lines, files and folders: messages, published chats, or prompt, question, response."
    )
    eval_data: list[str] = _setting([], "Held-out JSON lines; the loss of their answers is logged.")
    steps: Count | None = _setting(4000, "Optimisation steps.")
    batch_size: Count = _setting(8, "Rows per device and forward pass, of whole examples.")
    accumulation: Count = _setting(16, "Forward passes per optimisation step.")
    scheduler: str = _setting("cosine", "Learning-rate schedule (a name that transformers knows).")
    warmup: NonNegative = _setting(0.05, "Fraction of the steps (below 1) or number of steps of learning-rate warm-up.")

    input_length: Count = _setting(2048, "Maximum tokens of prompt and question; longer ones are truncated.")
    output_length: Count = _setting(2048, "Maximum tokens of a response; longer ones are truncated.")
    total_length: Count = _setting(2048, "Maximum tokens of an example; longer ones, chats too, are truncated.")
    row_length: Count | None = _setting(None, "Tokens of a row, the model's context; default: the model's own.")
    last_context_length: Count | None = _setting(
        None, "Tokens of the last row, which is not in memory; default: the model's own, or 1024."
    )
    split: Literal["random", "memory", "last"] = _setting(
        "random", "Part of an example in memory: random, as much as possible, or all but last_context_length tokens."
    )
    negatives: CountOrZero = _setting(0, "Rows of other examples that rows with answers attend to as memory.")
    negative_weight_warmup: Fraction = _setting(
        0.0, "Fraction of the steps over which the maximum of negative_weight rises from the minimum."
    )
    frozen_context: bool = _setting(
        False,
        "Encode the rows in memory by themselves, without gradient, once for all questions about them (needs "
        "trainable: memory_projections); batch_size is then the number of these rows.",
    )
    query_token_budget: Count = _setting(
        4096, "With frozen_context: tokens of a forward pass's questions and answers, padding included."
    )
    context_cache_rows: CountOrZero = _setting(0, "With frozen_context: rows whose hidden states are cached in RAM.")
    num_proc: Count | None = _setting(None, "Processes that tokenise.")

    prompt_field: str | None = _setting(None, "Field of the prompt before the question, such as system_prompt.")
    question_field: str = _setting("question", "Field of the question.")
    response_field: str = _setting("response", "Field of the response.")
    pre_prompt_text: str = _setting("", "Text before the prompt.")
    post_prompt_text: str = _setting("\n", "Text after the prompt.")
    pre_question_text: str = _setting("", "Text before the question.")
    post_question_text: str = _setting("\n", "Text after the question.")
    pre_response_text: str = _setting("", "Text before the response.")
    post_response_text: str = _setting("", "Text after the response.")
    chat_conversations_field: str = _setting("conversations", "Field of a published chat's turns.")
    chat_data_field: str = _setting("value", "Field of a turn's text.")
    chat_source_name_field: str = _setting("from", "Field of a turn's speaker.")
    chat_model_source_name: str = _setting("gpt", "Name of the model as a speaker.")
    chat_initial_prompt: str = _setting("You are a helpful ASSISTANT.\n\n", "Text before a published chat.")
    chat_model_response_prefix: str = _setting("\nASSISTANT: ", "Text before the model's turns.")
    chat_human_response_prefix: str = _setting("\nUSER: ", "Text before the other turns.")


@_settings
class LookupSettings(RunSettings):
    """Settings of the dictionary look-up task (Tworkowski et al. 2023, section 4.1), trained from scratch."""

    steps: Count = _setting(1400, "Optimisation steps.")
    batch_size: Count = _setting(8, "Full-length documents per forward pass that questions ask about.")
    learning_rate: Positive = _setting(1e-3, "Peak learning rate.")
    scheduler: str = _setting("cosine", "Learning-rate schedule (a name that transformers knows).")
    warmup: NonNegative = _setting(0.02, "Fraction of the steps (below 1) or number of steps of learning-rate warm-up.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = _setting(0.98, "AdamW's beta2.")
    seed: Seed = _setting(0, "Random seed.")

    vocabulary: Count = _setting(64, "Vocabulary size, six special tokens included.")
    key_length: Count = _setting(4, "Tokens of a key.")
    value_length: Count = _setting(4, "Tokens of a value.")
    row_length: Count = _setting(256, "Tokens of half a document, which is the local context.")

    hidden_size: Count = _setting(256, "Width of the model.")
    layers: Count = _setting(3, "Layers.")
    heads: Count = _setting(4, "Attention heads.")
    kv_heads: Count = _setting(1, "Key/value heads, stored in memory for each token.")
    mem_layer: CountOrZero = _setting(1, "Memory layer, counted from 0.")

    lines: Increasing = _setting([2, 4, 8, 16], "Lines of the short documents at the start of training; [] for none.")
    advance_lines_at_accuracy: Accuracy = _setting(0.8, "Training accuracy at which documents get longer.")
    sizes: Annotated[Increasing, Field(min_length=1)] = _setting(
        [1, 2, 4, 8, 16, 32, 64, 128],
        "Documents whose definitions a question attends to, its own included; advances at advance_at_accuracy.",
    )
    advance_at_accuracy: Accuracy = _setting(0.98, "Training accuracy at which the number of documents advances.")
    confusable: Fraction = _setting(
        0.9, "Fraction of the steps at the last size with keys of few symbols, so that many differ in one token."
    )
    confusable_documents: Count = _setting(32, "Maximum documents that a question attends to in such a step.")

    @model_validator(mode="after")
    def _check(self) -> LookupSettings:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            sizes = f"{self.hidden_size}, {self.heads} and {self.kv_heads}"
            raise LlamoryError(f"heads must divide hidden_size and kv_heads must divide heads, not {sizes}.")
        return self
