"""What a training run can be told; the command line's flags and the keys of a recipe file (no heavy imports here)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def _setting(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(kw_only=True)
class RunSettings:
    """What all training runs have in common."""

    output: str = _required("Folder for checkpoints and the trained model.")

    steps: int | None = _setting(None, "Optimisation steps.")
    batch_size: int = _setting(8, "Rows per device and forward pass.")
    accumulation: int = _setting(1, "Forward passes per optimisation step.")
    learning_rate: float = _setting(1e-5, "Peak learning rate.")
    scheduler: str = _setting("linear", "Learning-rate schedule (a name that transformers knows).")
    warmup: float = _setting(0.1, "Share of the steps over which the learning rate rises.")
    weight_decay: float = _setting(0.0, "Weight decay.")
    adam_beta2: float = _setting(0.999, "What AdamW keeps of its mean of squared gradients at each step.")
    max_grad_norm: float = _setting(1.0, "Gradients are clipped to this norm.")
    seed: int = _setting(42, "Seed of all that is random.")

    bf16: bool = _setting(False, "Compute in bfloat16 (weights stay in float32).")
    gradient_checkpointing: bool = _setting(False, "Recompute activations in the backward pass to save memory.")
    attn_implementation: str | None = _setting(
        None, "Attention kernel: sdpa, flash_attention_2, flex_attention, eager."
    )
    fsdp: bool = _setting(False, "Shard weights over the processes (FSDP) instead of copying them (DDP).")
    cpu: bool = _setting(False, "Train on the CPU even if there is a GPU.")

    log_every: int = _setting(10, "Steps between logged losses.")
    save_every: int = _setting(500, "Steps between checkpoints.")
    eval_every: int | None = _setting(None, "Steps between evaluations; default: at every checkpoint.")
    keep_checkpoints: int = _setting(2, "Checkpoints that are kept (at least 2, so that one is always whole).")
    report_to: list[str] = _setting([], "Trackers, such as tensorboard or wandb.")
    resume: bool = _setting(False, "Go on from the newest whole checkpoint in output.")
    quiet: bool = _setting(False, "No progress bar.")


@dataclass(kw_only=True)
class AdaptSettings(RunSettings):
    """What all runs that adapt a model to documents have in common."""

    data: list[str] = _required("Files and folders of documents (txt, md, rst, html, py, jsonl).")
    model: str = _setting("default", "A LLaMA: folder, .gguf file, hub id, or 'default' for the packaged SmolLM2-135M.")
    skip_broken: bool = _setting(False, "Pass over broken lines and files with a warning instead of stopping.")
    eval_data: list[str] = _setting([], "Files and folders for evaluation.")

    lora: bool = _setting(False, "Train low-rank adapters instead of the weights.")
    lora_rank: int = _setting(64, "Rank of the adapters.")
    lora_alpha: float = _setting(16.0, "Scale of the adapters (divided by the rank).")
    lora_dropout: float = _setting(0.1, "Dropout before the adapters.")
    lora_targets: list[str] = _setting(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], "Layers that get adapters."
    )


@dataclass(kw_only=True)
class LlaraSettings(AdaptSettings):
    """Settings of LLARA pretraining. The defaults are the paper's (Li et al. 2023, section 4) where it gives them."""

    data: list[str] = _required(
        "Files and folders of documents (txt, md, rst, html, py, jsonl), or the published JSONL."
    )
    output: str = _required("Folder for checkpoints, the trained model and its Sentence Transformers export.")
    eval_data: list[str] = _setting([], "Files and folders for evaluation; default: eval_fraction of the data.")
    steps: int | None = _setting(None, "Optimisation steps; default: as many as epochs take.")
    batch_size: int = _setting(8, "Passages per device and forward pass.")
    lora: bool = _setting(False, "Train low-rank adapters and the slot tokens' embeddings instead of all weights.")

    slots: int = _setting(8, "Slot tokens per prompt.")
    prediction_sees_summary: bool = _setting(False, "Let the prediction slots attend to the summary slots.")
    losses: list[str] = _setting(
        ["ar", "summarize", "predict"],
        "What is learned: the next token (ar), a summary's words, a continuation's words.",
    )
    bow_weighting: Literal["fixed", "learned"] = _setting(
        "fixed", "Weight of the bag-of-words losses: fixed or learned."
    )
    bow_weight: float = _setting(0.1, "Factor of the bag-of-words losses (the published code divides by 10).")
    query_prompt: Literal["prediction", "summary"] = _setting(
        "summary",
        "Prompt whose slots embed queries, once the model is exported (the paper's: prediction; without labels the "
        "other finds more).",
    )

    max_length: int = _setting(1024, "Longest sequence in tokens, prompts included.")
    chunk_size: int | None = _setting(None, "Longest passage cut from documents, in tokens; default: what fits.")
    languages: list[str] = _setting(["en"], "Languages whose stop words are no bag-of-words targets.")
    text_field: str = _setting("text", "Field that holds the text in JSONL documents.")
    streaming: bool = _setting(False, "Read the data while training instead of preparing it first (needs steps).")
    num_proc: int | None = _setting(None, "Processes that prepare the data.")
    workers: int = _setting(0, "Processes that load batches.")
    eval_fraction: float = _setting(0.0, "Share of the examples that is kept for evaluation.")
    epochs: float = _setting(1.0, "Passes over the data; steps takes precedence.")
    export: bool = _setting(True, "Write a Sentence Transformers folder when training ends.")
    whiten: int = _setting(0, "Passages that whitening of the embeddings is fitted on when training ends; 0 for none.")
    max_seq_length: int = _setting(512, "Longest sequence that the exported embedder reads, prompts included.")


@dataclass(kw_only=True)
class RetrieverSettings(AdaptSettings):
    """Settings of training a retriever on pairs of queries and documents."""

    data: list[str] = _required(
        "JSONL files with query, pos, neg and maybe pos_scores, neg_scores; folders of them; BEIR folders."
    )
    output: str = _required("Folder for checkpoints and the trained model, a Sentence Transformers folder.")
    model: str = _setting(
        "default",
        "A LLARA checkpoint, a Sentence Transformers folder, or any LLaMA: folder, .gguf file, hub id, 'default' for "
        "the packaged SmolLM2-135M, or 'retriever' for it as it is packaged to embed.",
    )
    eval_data: list[str] = _setting([], "Data of the same kinds whose loss is logged.")
    split: str = _setting("train", "Judgements of BEIR folders that are trained on: qrels/SPLIT.tsv.")
    eval_split: str = _setting("dev", "Judgements of BEIR folders in eval_data.")

    steps: int | None = _setting(None, "Optimisation steps; default: as many as epochs take.")
    epochs: float = _setting(1.0, "Passes over the queries; steps takes precedence.")
    batch_size: int = _setting(32, "Queries per device and step; its documents are negatives of its other queries.")
    learning_rate: float = _setting(2e-5, "Peak learning rate.")

    cache: bool = _setting(True, "Go through the batch in mini-batches (GradCache), so that memory allows any batch.")
    mini_batch: int = _setting(8, "Texts in one forward pass of a cached batch.")
    share_negatives: bool = _setting(True, "Let queries see the documents of all processes as negatives.")
    temperature: float = _setting(0.01, "Cosines are divided by this.")
    group_size: int = _setting(
        8, "Documents per query: one positive, the others negatives, as far as the data have any."
    )
    matryoshka: list[int] = _setting([], "Smaller dimensions to train for too: the first so many of a vector.")

    mine: int = _setting(0, "Hard negatives that are mined per query before training; 0 for none.")
    mine_with: str | None = _setting(None, "Model that mines; default: the model as it is before training.")
    mine_skip: int = _setting(0, "The best so many documents are never mined.")
    mine_depth: int | None = _setting(None, "Documents per query that are looked at; default: ten for each one mined.")
    mine_margin: float = _setting(0.05, "Mined negatives score less than the positive by this share, at least.")

    distill: Literal["auto", "off", "kl", "margin_mse"] = _setting(
        "auto", "Learn a teacher's scores too; auto: kl, if every query's documents have scores."
    )
    distill_weight: float = _setting(1.0, "Weight of the loss beside the teacher's scores.")
    contrastive_weight: float = _setting(1.0, "Weight of the contrastive loss where there is a teacher.")
    teacher_temperature: float = _setting(1.0, "A teacher's scores are divided by this.")

    query_length: int | None = _setting(None, "Longest query in tokens, prompt included; default: as passages.")
    passage_length: int | None = _setting(
        None, "Longest document in tokens, prompt included; default: what the model's folder says, or 512."
    )
    query_prompt: Literal["prediction", "summary"] | None = _setting(
        None, "Prompt whose slots embed queries; default: what the model says, prediction for a LLaMA without slots."
    )
    slots: int = _setting(8, "Slot tokens per prompt, for a LLaMA that has none.")
    workers: int = _setting(0, "Processes that load batches.")


@dataclass(kw_only=True)
class DistillationSettings(AdaptSettings):
    """Settings of runs that may keep what a teacher predicts without memory."""

    teacher: str | None = _setting(
        None,
        "Model whose predictions in rows without memory are kept, so that short contexts don't get worse: the one that "
        "training began with, say; none: nothing is kept.",
    )
    teacher_weight: float = _setting(1.0, "Weight of the divergence from the teacher beside the next-token loss.")
    teacher_rows: int = _setting(4, "Rows of each pass that are read without memory for it, in turns.")


_TRAINABLE_HELP = (
    "Train all layers, only the attention of memory layers, or only projections that memory gets for itself there, "
    "which leaves what is read without memory as it was; with lora the adapters are there."
)


@dataclass(kw_only=True)
class FotSettings(DistillationSettings):
    """Settings of FoT training. The defaults are the published 3B model's (Tworkowski et al. 2023) where there are any.

    The data are as many independent streams of batches as a step has passes (accumulation × processes).
    """

    output: str = _required("Folder for checkpoints and the trained LongLLaMA.")
    eval_data: list[str] = _setting([], "Held-out files and folders: the loss with memory and without is logged.")
    steps: int | None = _setting(1000, "Optimisation steps.")
    batch_size: int = _setting(16, "Rows per device and forward pass; they can see one another.")
    learning_rate: float = _setting(2e-5, "Peak learning rate.")
    scheduler: str = _setting("constant_with_warmup", "Learning-rate schedule (a name that transformers knows).")
    warmup: float = _setting(0.02, "Share of the steps over which the learning rate rises.")
    weight_decay: float = _setting(0.01, "Weight decay.")

    proportions: list[float] = _setting([], "Share in tokens of each entry of data; default: all as one source.")
    row_length: int = _setting(2048, "Tokens of a row, which become the model's context.")
    dataset_packing: int = _setting(4, "Consecutive rows that hold consecutive chunks of one document.")
    min_length: int | None = _setting(
        None, "Documents with fewer tokens are passed over; default: row_length. 1 takes all, short ones are joined."
    )
    text_field: str = _setting("text", "Field that holds the text in JSONL documents.")
    shuffle_buffer: int = _setting(256, "Documents per source that are shuffled together; 0 for none.")

    mem_layers: list[int] = _setting(
        [], "Layers with memory; default: the model's own, for a plain LLaMA three spread as in the published models."
    )
    crossbatch_schedule: list[str] = _setting(
        [],
        "Which rows a row sees: POSITIVES+NEGATIVES for each equal share of the batch, or the published '3b' or '7b'; "
        "default: 3b, if there is no cross_batch_range.",
    )
    cross_batch_range: int | None = _setting(
        None, "Instead of a crossbatch_schedule: each row sees so many rows before it."
    )
    crossbatch_stepping: bool = _setting(False, "With cross_batch_range: later chunks of a document see more rows.")
    schedule: Literal["constant", "sampled", "curriculum"] = _setting(
        "constant", "Number of contexts: constant, drawn from sizes for each step, or going up through sizes."
    )
    sizes: list[int] = _setting(
        [], "Numbers of contexts (negatives, with a crossbatch_schedule) that the schedule uses."
    )
    advance_at_accuracy: float = _setting(
        0.98, "Training accuracy at which a curriculum schedule goes to the next size."
    )
    negatives: Literal["random", "similar"] = _setting(
        "random", "Other documents that a row sees: at random, or those that the retriever finds closest."
    )
    retriever: str | None = _setting(
        None, "Model that finds similar negatives: Sentence Transformers or LLARA, folder or hub id."
    )
    negative_weight: list[float] = _setting(
        [],
        "Least and most of its kind that a negative counts as in the softmax (drawn for each row, evenly on a "
        "logarithmic scale), so that a few rows stand for a large memory; default: 1.",
    )
    memory_size_bias: float | None = _setting(
        None, "How much of memory's growth is taken off its scores, 0 to 1; default: the model's own, or 0."
    )
    trainable: Literal["all", "memory_layers", "memory_projections"] = _setting("all", _TRAINABLE_HELP)
    eval_batches: int = _setting(8, "Batches of eval_data that are evaluated.")


@dataclass(kw_only=True)
class InstructSettings(DistillationSettings):
    """Settings of instruction tuning. The defaults are those of the published LongLLaMA-Instruct-3Bv1.1.

    The data are as many independent streams of batches as a step has passes (accumulation × processes).
    """

    data: list[str] = _required(
        "JSON lines, files and folders of them: messages, published chats, or prompt, question and response."
    )
    output: str = _required("Folder for checkpoints and the tuned LongLLaMA.")
    eval_data: list[str] = _setting([], "Held-out JSON lines; the loss of their answers is logged.")
    steps: int | None = _setting(4000, "Optimisation steps.")
    batch_size: int = _setting(8, "Rows per device and forward pass, of whole examples.")
    accumulation: int = _setting(16, "Forward passes per optimisation step.")
    scheduler: str = _setting("cosine", "Learning-rate schedule (a name that transformers knows).")
    warmup: float = _setting(0.05, "Share of the steps over which the learning rate rises.")

    proportions: list[float] = _setting([], "Share in examples of each entry of data; default: all as one source.")
    input_length: int = _setting(2048, "Longest prompt and question in tokens; longer ones lose their end.")
    output_length: int = _setting(2048, "Longest response in tokens; longer ones lose their end.")
    total_length: int = _setting(2048, "Longest example in tokens; longer ones, chats too, lose their end.")
    row_length: int | None = _setting(None, "Tokens of a row, the model's context; default: the model's own.")
    last_context_length: int | None = _setting(
        None, "Tokens of the last row, which isn't in memory; default: the model's own, or 1024."
    )
    split: Literal["random", "memory", "last"] = _setting(
        "random",
        "How much of an example is in memory: at random, as much as possible, or all but the last row's length.",
    )
    negatives: int = _setting(
        0, "Rows of other examples (in front of their answers) that rows with answers see in memory as well."
    )
    negative_weight: list[float] = _setting(
        [],
        "Least and most of its kind that each of these counts as in the softmax (drawn for each row, evenly on a "
        "logarithmic scale), so that they stand for a large memory; default: 1.",
    )
    negative_weight_warmup: float = _setting(0.0, "Share of the steps over which the most copies grow from the least.")
    frozen_context: bool = _setting(
        False,
        "Read the rows in memory by themselves, without gradient, once for all questions about them (trained: "
        "memory_projections); batch_size is then the number of these rows.",
    )
    query_token_budget: int = _setting(
        4096, "With frozen_context: tokens of a pass's questions and answers, padding and all."
    )
    context_cache_rows: int = _setting(
        0, "With frozen_context: rows whose hidden states are kept in RAM from step to step."
    )
    mem_layers: list[int] = _setting(
        [], "Layers with memory; default: the model's own, for a plain LLaMA three spread as in the published models."
    )
    memory_size_bias: float | None = _setting(
        None, "How much of memory's growth is taken off its scores, 0 to 1; default: the model's own, or 0."
    )
    trainable: Literal["all", "memory_layers", "memory_projections"] = _setting("all", _TRAINABLE_HELP)
    eval_batches: int = _setting(8, "Batches of eval_data that are evaluated.")
    num_proc: int | None = _setting(None, "Processes that tokenise.")

    prompt_field: str | None = _setting(None, "Field of the prompt before the question, such as system_prompt.")
    question_field: str = _setting("question", "Field of the question.")
    response_field: str = _setting("response", "Field of the response.")
    pre_prompt_text: str = _setting("", "Text before the prompt.")
    post_prompt_text: str = _setting("\n", "Text behind the prompt.")
    pre_question_text: str = _setting("", "Text before the question.")
    post_question_text: str = _setting("\n", "Text behind the question.")
    pre_response_text: str = _setting("", "Text before the response.")
    post_response_text: str = _setting("", "Text behind the response.")
    chat_conversations_field: str = _setting("conversations", "Field of a published chat's turns.")
    chat_data_field: str = _setting("value", "Field of a turn's text.")
    chat_source_name_field: str = _setting("from", "Field of who says it.")
    chat_model_source_name: str = _setting("gpt", "Who the model is there.")
    chat_initial_prompt: str = _setting("You are a helpful ASSISTANT.\n\n", "What a published chat begins with.")
    chat_model_response_prefix: str = _setting("\nASSISTANT: ", "Text before the model's turns.")
    chat_human_response_prefix: str = _setting("\nUSER: ", "Text before the other turns.")


@dataclass(kw_only=True)
class LookupSettings(RunSettings):
    """Settings of the dictionary look-up task (Tworkowski et al. 2023, section 4.1), trained from scratch."""

    output: str = _required("Folder for checkpoints and the trained model.")
    steps: int | None = _setting(1400, "Optimisation steps.")
    batch_size: int = _setting(8, "Documents of a full row's length that are asked about in a pass.")
    learning_rate: float = _setting(1e-3, "Peak learning rate.")
    scheduler: str = _setting("cosine", "Learning-rate schedule (a name that transformers knows).")
    warmup: float = _setting(0.02, "Share of the steps over which the learning rate rises.")
    adam_beta2: float = _setting(0.98, "What AdamW keeps of its mean of squared gradients at each step.")
    seed: int = _setting(0, "Seed of all that is random.")

    vocabulary: int = _setting(64, "Tokens, six of which are marks.")
    key_length: int = _setting(4, "Tokens of a key.")
    value_length: int = _setting(4, "Tokens of a value.")
    row_length: int = _setting(256, "Tokens of half a document, which is the local context.")

    hidden_size: int = _setting(256, "Width of the model.")
    layers: int = _setting(3, "Layers.")
    heads: int = _setting(4, "Attention heads.")
    kv_heads: int = _setting(1, "Key/value heads, what memory holds of each token.")
    mem_layer: int = _setting(1, "The layer with memory, counted from 0.")

    lines: list[int] = _setting([2, 4, 8, 16], "Lines of the short documents that training begins with; [] for none.")
    advance_lines_at_accuracy: float = _setting(0.8, "Training accuracy at which documents get longer.")
    sizes: list[int] = _setting(
        [1, 2, 4, 8, 16, 32, 64, 128],
        "Documents that a question sees definitions of, its own among them; the next number once advance_at_accuracy is reached.",
    )
    advance_at_accuracy: float = _setting(0.98, "Training accuracy at which the number of documents grows.")
    confusable: float = _setting(
        0.9, "Share of the steps at the last size whose keys are made of few symbols, so that many are nearly alike."
    )
    confusable_documents: int = _setting(32, "Documents that a question sees definitions of in such a step, at most.")
