"""Training a retriever on queries and documents with the Sentence Transformers trainer and losses."""

from __future__ import annotations

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.modules import WordWeights
from sentence_transformers.util import is_sentence_transformer_model
from torch.utils.data import DataLoader

from llamory.embedding.encoder import escape_slot_tokens, is_llara
from llamory.embedding.pipeline import load_embedder, save_embedder
from llamory.embedding.whitening import Whitening, whitening_router
from llamory.errors import LlamoryError
from llamory.llara.modeling import NewLlamaModel
from llamory.llara.template import LlaraTemplate
from llamory.models import base as backbone
from llamory.training.distillation import ranking_loss
from llamory.training.pairs import (
    MINED_FILE,
    POSITIVE,
    QUERY,
    FalseNegativeFreeSampler,
    GroupDataset,
    Pairs,
    add_mined_negatives,
    load_pairs,
    negative_names,
)
from llamory.training.run import (
    SingleDeviceArguments,
    check_finite,
    lora_config,
    prepare_run,
    run,
    run_result,
    save_trained_model,
    stop_if_finished,
    training_arguments,
    user_errors,
)
from llamory.training.settings import RetrieverSettings

logger = logging.getLogger(__name__)

_INITIAL_MODEL = "start"  # folder of a LLaMA with added slot tokens during the run
_ADAPTER = "adapter"


def train_retriever(settings: RetrieverSettings) -> dict[str, Any]:
    """Train a retriever on queries and documents; `settings.output` becomes a Sentence Transformers folder.

    Returns the output folder, counts (steps, queries, mined negatives, ...), the teacher's loss and the last losses.
    Raises LlamoryError if settings, data, model or output folder can't be used, or a loss is not finite.
    """
    output = Path(settings.output)
    arguments = _arguments(settings)
    checkpoint = prepare_run(settings, arguments)
    with arguments.main_process_first(desc="data and model"):
        train, held_out = _load_data(settings)
        teacher = _teacher(settings, train, held_out)
        source = _model_source(settings, output, write=arguments.process_index == 0)
        embedder = _load(settings, source, arguments.device)
        _disable_padding(embedder, settings)
        if settings.lora:
            _add_adapters(embedder, settings)
        train = train.map_texts(lambda texts: escape_slot_tokens(embedder, texts))
        initial_negatives = sum(len(example.negatives) for example in train.examples)
        if settings.mine:
            miner = load_embedder(settings.mine_with) if settings.mine_with else embedder
            train = add_mined_negatives(train, miner, settings, output / MINED_FILE)
    evaluation = None
    if held_out is not None:
        held_out = held_out.map_texts(lambda texts: escape_slot_tokens(embedder, texts))
        held_out_groups = _groups(held_out, settings, teacher)
        evaluation = Dataset.from_list([held_out_groups[number] for number in range(len(held_out))])
    groups = _groups(train, settings, teacher)
    gather_across_devices = settings.share_negatives and arguments.world_size > 1
    batches = _batches(groups, settings, arguments)
    _set_columns(arguments, embedder, groups.group_size)
    make_trainer = partial(
        RetrieverTrainer,
        model=embedder,
        args=arguments,
        eval_dataset=evaluation,
        loss=ranking_loss(embedder, settings, teacher=teacher, gather_across_devices=gather_across_devices),
        data_collator=_collator(embedder, settings, arguments),
        groups=groups,
        batches=batches,
    )
    trainer = run(make_trainer, settings, checkpoint, "Retriever training")
    result = run_result(
        trainer,
        "loss",
        "eval_loss",
        queries=len(train),
        mined=sum(len(example.negatives) for example in train.examples) - initial_negatives,
        group_size=groups.group_size,
        teacher=teacher,
        dimension=embedder.get_embedding_dimension(),
    )
    save_trained_model(trainer, settings, None, result, save=lambda folder: _save(embedder, settings, source, folder))
    if arguments.process_index == 0:
        shutil.rmtree(output / _INITIAL_MODEL, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return result


class RetrieverArguments(SingleDeviceArguments, SentenceTransformerTrainingArguments):
    """Arguments of the Sentence Transformers trainer, for one device per process."""


class RetrieverTrainer(SentenceTransformerTrainer):
    """The Sentence Transformers trainer on groups sampled anew in each epoch, in batches without false negatives."""

    control: Any  # the Trainer's, which has no annotation there

    def __init__(self, *args: Any, groups: GroupDataset, batches: FalseNegativeFreeSampler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups, self.batches = groups, batches

    def get_train_dataloader(self) -> Any:
        """This process's batches; the sampler distributes them over processes."""
        workers = self.args.dataloader_num_workers
        return _EpochDataLoader(
            self.groups, batch_sampler=self.batches, collate_fn=self.data_collator, num_workers=workers
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The step's batches; none after the last step."""
        if stop_if_finished(self):
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The loss of a batch; raises LlamoryError unless it is finite."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        check_finite(loss, self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss


class _EpochDataLoader(DataLoader[Any]):
    def set_epoch(self, epoch: int) -> None:
        assert isinstance(self.batch_sampler, FalseNegativeFreeSampler)
        self.batch_sampler.set_epoch(epoch)


def _arguments(settings: RetrieverSettings) -> RetrieverArguments:
    return training_arguments(
        settings,
        "LlamaDecoderLayer",
        RetrieverArguments,
        has_eval_data=bool(settings.eval_data),
        num_train_epochs=settings.epochs,
        dataloader_num_workers=settings.workers,
        batch_sampler=BatchSamplers.NO_DUPLICATES,  # of evaluation data; training uses FalseNegativeFreeSampler
    )


def _set_columns(arguments: RetrieverArguments, embedder: SentenceTransformer, group_size: int) -> None:
    """Set the task and the prompt of each column as in `encode_query` and `encode_document`."""
    columns, prompts = [POSITIVE, *negative_names(group_size)], embedder.prompts
    arguments.router_mapping = {QUERY: "query", **dict.fromkeys(columns, "document")}
    default = prompts.get(embedder.default_prompt_name or "", "")
    document = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), default)
    column_prompts = {QUERY: prompts.get("query", default), **dict.fromkeys(columns, document)}
    arguments.prompts = {column: prompt for column, prompt in column_prompts.items() if prompt}


def _teacher(settings: RetrieverSettings, train: Pairs, held_out: Pairs | None) -> str:
    """The loss on a teacher's scores: "kl", "margin_mse" or "off"."""
    if settings.distill == "off" or (settings.distill == "auto" and (settings.mine or settings.group_size < 2)):
        return "off"
    unscored = train.unscored or ([] if held_out is None else held_out.unscored)
    if not unscored:
        return "kl" if settings.distill == "auto" else settings.distill
    if settings.distill != "auto":
        raise LlamoryError(f"{unscored[0].location}: distill needs neg, pos_scores and neg_scores for every query.")
    if len(train.unscored) < len(train):
        message = "The teacher's scores are not used: %d queries have none, the first is %s"
        logger.warning(message, len(unscored), unscored[0].location)
    return "off"


def _load_data(settings: RetrieverSettings) -> tuple[Pairs, Pairs | None]:
    train = load_pairs(settings.data, split=settings.split, skip_broken=settings.skip_broken)
    if not settings.eval_data:
        return train, None
    return train, load_pairs(settings.eval_data, split=settings.eval_split, skip_broken=settings.skip_broken)


def _groups(pairs: Pairs, settings: RetrieverSettings, teacher: str) -> GroupDataset:
    size = 1 + max(len(example.negatives) for example in pairs.examples)
    return GroupDataset(pairs, min(settings.group_size, size), settings.seed, scored=teacher != "off")


def _batches(groups: GroupDataset, settings: RetrieverSettings, arguments: Any) -> FalseNegativeFreeSampler:
    """The batch sampler; raises LlamoryError if there is no valid batch."""
    process, processes = arguments.process_index, arguments.world_size
    batches = FalseNegativeFreeSampler(groups, settings.batch_size, process=process, processes=processes)
    if not len(batches):
        raise LlamoryError(
            f"No batch can be made of {len(groups)} queries without negatives; add queries or negatives (`neg`, mine), "
            "or set batch_size to at least 2."
        )
    return batches


def _collator(embedder: SentenceTransformer, settings: RetrieverSettings, arguments: RetrieverArguments) -> Any:
    return SentenceTransformerDataCollator(
        preprocess_fn=embedder.preprocess,
        router_mapping=arguments.router_mapping,
        prompts=arguments.prompts,
        max_length=_lengths(embedder, settings),
    )


def _lengths(embedder: SentenceTransformer, settings: RetrieverSettings) -> dict[str, int]:
    """Maximum tokens of a query and of a document; raises LlamoryError if one has no room for text."""
    passage = settings.max_passage_length or embedder.max_seq_length
    lengths = {"query": settings.max_query_length or passage, "document": passage}
    for task, length in lengths.items():
        prompt = embedder.preprocess([""], task=task)["input_ids"].shape[-1]
        if length is not None and length <= prompt:
            name = "max_query_length" if task == "query" else "max_passage_length"
            raise LlamoryError(f"{name} {length} leaves no room for a {task}, since its prompt has {prompt} tokens.")
    return {task: length for task, length in lengths.items() if length is not None}


def _model_source(settings: RetrieverSettings, output: Path, *, write: bool) -> str:
    """Name or folder to load the embedder from: the model, or a new folder with slot tokens or an adapter added."""
    name = settings.model
    if backbone.packaged_name(name) is None and not name.endswith(".gguf") and is_sentence_transformer_model(name):
        return name
    config = backbone.load_config(name)
    if config.model_type != "llama":
        raise LlamoryError(f"{name} is a {config.model_type} model; a retriever starts from a plain LLaMA.")
    adapted = backbone.adapter_folder(name) is not None
    if not adapted and LlaraTemplate.from_config(config) is not None:  # type: ignore[arg-type]
        return str(backbone.resolve(name))
    start = output / _INITIAL_MODEL
    if write:
        _write_initial_model(settings, start)
    return str(start)


def _write_initial_model(settings: RetrieverSettings, start: Path) -> None:
    """Write a plain LLaMA as a LLARA checkpoint with new slot tokens, or with those of an adapter; deterministic."""
    tokenizer = backbone.load_tokenizer(settings.model)
    model = backbone.load_model(settings.model, dtype=torch.float32)
    template = LlaraTemplate.from_config(model.config) or LlaraTemplate.from_tokenizer(tokenizer, settings.slots)
    template.prepare_model(model)
    shutil.rmtree(start, ignore_errors=True)
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    adapter = backbone.adapter_folder(settings.model)
    if adapter is not None and (whitening := Whitening.load(adapter, model.config.hidden_size)) is not None:
        whitening.save(start)


def _load(settings: RetrieverSettings, source: str, device: torch.device) -> SentenceTransformer:
    longest = max(settings.max_passage_length, settings.max_query_length or 0) if settings.max_passage_length else None
    kwargs: dict[str, Any] = {"max_length": longest, "device": str(device), "query_prompt": settings.query_prompt}
    if settings.attn_implementation:
        kwargs["attn_implementation"] = settings.attn_implementation
    with user_errors(f"{settings.model} can't be loaded with these settings"):
        embedder = load_embedder(source, dtype=torch.float32, **kwargs)
    embedder.model_card_data.local_files_only = True
    for module in embedder:
        if isinstance(module, WordWeights):
            module.requires_grad_(False)  # fixed weights that select the slots
    if is_llara(embedder) and (router := whitening_router(embedder)) is not None:
        router.requires_grad_(False)  # stays as fitted
    dimension = embedder.get_embedding_dimension()
    if invalid := [size for size in settings.matryoshka if not 0 < size <= (dimension or size)]:
        raise LlamoryError(f"matryoshka dimensions must be from 1 to the model's {dimension}, not {invalid[0]}.")
    _lengths(embedder, settings)
    return embedder


def _disable_padding(embedder: SentenceTransformer, settings: RetrieverSettings) -> None:
    """Compute a LLARA model without padding during training: equal embeddings and gradients in less time."""
    if is_llara(embedder) and settings.attn_implementation != "eager":
        padded = embedder[0].auto_model
        with torch.device("meta"):
            flat = NewLlamaModel(padded.config)
        flat.load_state_dict(padded.state_dict(), assign=True)
        flat.rotary_emb = padded.rotary_emb  # buffers that no state dict holds
        embedder[0].model = flat


def _add_adapters(embedder: SentenceTransformer, settings: RetrieverSettings) -> None:
    """Add adapters; of a LLARA model's embeddings only the slot tokens' rows are trained."""
    slots: dict[str, Any] = {}
    if is_llara(embedder) and (template := LlaraTemplate.from_config(embedder[0].config)):
        rows = sorted(template.summarize_slot_ids + template.predict_slot_ids)
        slots = {"trainable_token_indices": {"embed_tokens": rows}}
    with user_errors("These LoRA settings don't fit the model"):
        embedder.add_adapter(lora_config(settings, **slots))
    if settings.gradient_checkpointing:
        embedder[0].auto_model.enable_input_require_grads()


def _save(embedder: SentenceTransformer, settings: RetrieverSettings, source: str, folder: Path) -> None:
    """Write the trained model as stock modules; adapters are merged into the weights that they were trained on."""
    stock = _load(settings, source, embedder.device)
    if settings.lora:
        from peft import PeftModel

        embedder[0].auto_model.save_pretrained(folder / _ADAPTER)
        adapted = PeftModel.from_pretrained(stock[0].auto_model, str(folder / _ADAPTER))
        stock[0].model = adapted.merge_and_unload()
    else:
        stock.load_state_dict(embedder.state_dict())
    save_embedder(stock, folder)
