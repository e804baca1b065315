"""LongLLaMA as a language model: logits, generate, and a memory that can be kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from llamory.errors import LlamoryError
from llamory.longllama.cache import LongLlamaCache
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.crossbatch import Contexts
from llamory.longllama.losses import IGNORE_INDEX, next_token_loss
from llamory.longllama.modeling import LongLlamaModel, LongLlamaPreTrained
from llamory.memory import MemoryBank
from llamory.models.adapters import merged

_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
_CHUNK_ELEMENTS = 1 << 22


class LongLlamaForCausalLM(LongLlamaPreTrained, LlamaForCausalLM):
    """A language model that reads and answers with memory; a drop-in for `LlamaForCausalLM`, with the same weights."""

    config_class = LongLlamaConfig
    config: LongLlamaConfig
    _no_split_modules = ["LongLlamaDecoderLayer"]
    _can_compile_fullgraph = False

    def __init__(self, config: LongLlamaConfig):
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LongLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def device(self) -> torch.device:
        """Where inputs belong, even if the first weights are offloaded: accelerate then has nothing of them here."""
        device: torch.device = super().device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        execution_devices = (getattr(hook, "execution_device", None) for hook in hooks)
        main_device = next((candidate for candidate in execution_devices if candidate is not None), None)
        return device if main_device is None else torch.device(main_device)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        last_context_length: int | None = None,
        contexts: Contexts | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Llama's forward for inputs of any length; see `LongLlamaModel.forward`.

        Logits, (batch, columns kept, vocabulary), are computed for the last `logits_to_keep` columns only. In training
        with `contexts` there are none: the loss goes through the head chunk by chunk.

        Args:
            contexts: per row, the rows whose contexts it sees as well; the rows are then a window each.
            shift_labels: (batch, length) what each place should predict, instead of `labels`, where that is the next
                column's label.
            num_items_in_batch: what the sum of the losses is divided by.
            kwargs: passed on, such as `context_weights`.
        """
        query_rows = None
        if contexts is not None:
            shift_labels = _shift_labels(labels) if shift_labels is None and labels is not None else shift_labels
            # Rows that predict nothing are only seen by others.
            query_rows = (
                None if shift_labels is None else (shift_labels != IGNORE_INDEX).any(1).nonzero()[:, 0].tolist()
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            last_context_length=last_context_length,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            contexts=contexts,
            query_rows=query_rows,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if contexts is not None:
            loss = None
            if shift_labels is not None:
                loss = next_token_loss(hidden, self.lm_head.weight, shift_labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, hidden_states=(hidden,))
        logits = self.lm_head(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        loss = None
        if labels is not None or shift_labels is not None:
            kwargs |= {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    # ---- generate ------------------------------------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` has to leave the choice of the cache to this class.
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongLlamaCache(self.config)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', but without a cache each step reads the whole text anew, with a mounted memory."""
        if use_cache is False and isinstance(past_key_values, LongLlamaCache):
            past_key_values = past_key_values.fresh_copy()
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, use_cache=use_cache, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("use_cache") is False:
            outputs.past_key_values = model_kwargs.get("past_key_values")
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    # ---- memory --------------------------------------------------------------------------------------------------

    def memory_fingerprint(self) -> str:
        """What this model's memories are marked with: it changes with the weights and with how keys are made."""
        return _fingerprint(self)

    def new_memory(self) -> MemoryBank:
        """An empty memory for `read`."""
        return self.model.new_memory(self.memory_fingerprint())

    @torch.no_grad()
    def read(
        self,
        input_ids: Tensor | Sequence[int],
        memory: MemoryBank | None = None,
        segment: str = "context",
        on_window: Callable[[int], None] | None = None,
    ) -> MemoryBank:
        """Read a document by itself into a segment of a memory, window by window.

        A segment that is there already is read on: the document's windows see what it holds, and no other segment.

        Args:
            input_ids: the document's tokens.
            memory: where the segment goes; a new memory if none is given.
            segment: the segment's name.
            on_window: called after each window with the tokens read so far.

        Returns:
            The memory.

        Raises:
            LlamoryError: the model has no memory layers, or the memory is another model's.
        """
        self._require_memory_layers()
        memory = self.new_memory() if memory is None else memory
        self._check_memory(memory)
        ids = torch.as_tensor(input_ids, dtype=torch.long).flatten()
        # What is read stands beside until all of it is there: an interruption leaves the memory as it was.
        staging, order = memory.empty_sibling(), memory.segments
        if segment in order:
            staging.attach(memory, [segment])
        for num_tokens in encode_windows(self, [ids], [staging]):
            if on_window is not None:
                on_window(num_tokens)
        if len(ids):
            if segment in order:
                memory.drop(segment)
            else:
                staging.rename(staging.segments[0], segment)
            memory.attach(staging)
            memory.reorder(order if segment in order else (*order, segment))
        return memory

    def memory_cache(self, memory: MemoryBank) -> LongLlamaCache:
        """A cache that has a memory mounted: pass it as `past_key_values`, with nothing but the question as input.

        The memory itself isn't changed by what is asked; its blocks are shared, not copied.

        Raises:
            LlamoryError: the model has no memory layers, or the memory is another model's.
        """
        self._require_memory_layers()
        self._check_memory(memory)
        return LongLlamaCache(self.config, memory)

    def _require_memory_layers(self) -> None:
        if not self.config.mem_layers:
            raise LlamoryError("This model has no memory layers; load it with mem_layers, for instance mem_layers=[8].")

    def _check_memory(self, memory: MemoryBank) -> None:
        config = self.config
        memory.check_compatible(
            "The memory",
            fingerprint=self.memory_fingerprint() if memory.fingerprint else None,
            heads=(config.num_key_value_heads, config.head_dim),
            layers=config.mem_layers,
        )


@torch.no_grad()
def encode_windows(
    model: LongLlamaForCausalLM, rows: Sequence[Tensor], banks: Sequence[MemoryBank], start: int = 0
) -> Iterator[int]:
    """Encode documents into memory window by window; no document attends to another.

    The model is in evaluation mode meanwhile. Iteration may stop after any window; what was encoded stays in the banks.

    Args:
        model: the model.
        rows: the token ids of each document, (tokens,) each. The documents are encoded as one batch.
        banks: one memory per document. A document attends to all that its memory holds.
        start: the token to start at; for documents whose first tokens are in their memories already.

    Yields:
        After each window, how many tokens of each document are encoded, at most.
    """
    context, longest = model.config.max_position_embeddings, max(map(len, rows), default=0)
    training = model.training
    model.eval()
    try:
        for first in range(start, longest, context):
            active = [index for index, row in enumerate(rows) if len(row) > first]
            windows = [rows[index][first : first + context].long() for index in active]
            ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)  # (rows, width)
            lengths = torch.tensor([len(window) for window in windows])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            model.model(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                past_key_values=LongLlamaCache(model.config, [banks[index] for index in active]),
                use_cache=False,
                last_context_length=context,
                logits_to_keep=None,
            )
            yield min(first + context, longest)
    finally:
        model.train(training)


def _shift_labels(labels: Tensor) -> Tensor:
    """Labels, (batch, length), moved by one: what each place should predict."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]


def _fingerprint(model: nn.Module) -> str:
    """The fingerprint of a LongLLaMA model: of its weights, as bfloat16, and of how it makes memory keys.

    Loading the same weights as float32 or as bfloat16 gives the same fingerprint; an adapter gives another one, the
    same one whether it is merged into the weights or beside them. The weights are read once, and again only if they
    have changed.
    """
    versions = tuple((name, parameter.data_ptr(), parameter._version) for name, parameter in model.named_parameters())
    config: Any = model.config
    key_settings = [
        config.mem_positionals,
        config.rope_parameters,
        list(config.mem_layers),
        config.max_position_embeddings,
    ]
    state = (versions, json.dumps(key_settings, default=str))
    cached = _FINGERPRINTS.get(model)
    if cached is not None and cached[0] == state:
        return cached[1]
    digest = xxhash.xxh3_128(json.dumps(key_settings, default=str, sort_keys=True).encode())
    # A tied head has a name of its own only where it is offloaded, which mustn't make another model of this one.
    tied = getattr(model, "all_tied_weights_keys", {})
    # Shared ones count under each of their names, as models whose weights aren't shared have them.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = [(name, parameter) for name, parameter in parameters.items() if name not in tied]
    for name, make in sorted(merged(model, named), key=lambda item: item[0]):
        parameter = make()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        for start in range(0, len(flat), _CHUNK_ELEMENTS):
            part = flat[start : start + _CHUNK_ELEMENTS].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(part.numpy().tobytes())
    _FINGERPRINTS[model] = (state, digest.hexdigest())
    return digest.hexdigest()


AutoModelForCausalLM.register(LongLlamaConfig, LongLlamaForCausalLM, exist_ok=True)
