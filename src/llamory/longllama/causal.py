"""LongLLaMA as a language model: logits, generation, and memory."""

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
    """A language model with memory; a drop-in replacement for `LlamaForCausalLM` with the same weights."""

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
        """The device for inputs, also where accelerate has offloaded the first weights to CPU or disk."""
        device: torch.device = super().device
        if device.type != "meta":
            return device
        placed = [where for where in getattr(self, "hf_device_map", {}).values() if where not in ("cpu", "disk")]
        return torch.device(placed[0]) if placed else torch.device("cpu")

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
        """Llama's forward for inputs of any length; the arguments are also those of `LongLlamaModel.forward`.

        Args:
            contexts: per row, the rows that it sees in training; each row is then one window. There are no logits: the
                loss applies the head to one chunk at a time.
            shift_labels: (batch, length) the token that each column predicts, instead of `labels`.
            num_items_in_batch: divides the sum of the losses.
            kwargs: passed to the model, such as `context_weights`.
        """
        query_rows = None
        if contexts is not None:
            if shift_labels is None and labels is not None:
                shift_labels = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
            if shift_labels is not None:  # rows that predict nothing are only seen by others
                query_rows = (shift_labels != IGNORE_INDEX).any(1).nonzero()[:, 0].tolist()
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        inputs |= {"last_context_length": last_context_length, "logits_to_keep": logits_to_keep, "return_dict": True}
        outputs = self.model(**inputs, contexts=contexts, query_rows=query_rows, **kwargs)
        hidden, loss = outputs.last_hidden_state, None
        if contexts is not None:
            if shift_labels is not None:
                loss = next_token_loss(hidden, self.lm_head.weight, shift_labels, num_items_in_batch)
            return CausalLMOutputWithPast(loss=loss, hidden_states=(hidden,))
        logits = self.lm_head(hidden if isinstance(logits_to_keep, int) else hidden[:, logits_to_keep])
        if labels is not None or shift_labels is not None:
            kwargs |= {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # So that `generate` leaves the choice of the cache to this class.
        return False

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LongLlamaCache(self.config)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Cache | None = None, use_cache: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; without a cache, each step processes the whole text again with the attached memory."""
        if use_cache is False and isinstance(past_key_values, LongLlamaCache):
            past_key_values = past_key_values.fresh_copy()
        kwargs |= {"past_key_values": past_key_values, "use_cache": use_cache}
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if model_kwargs.get("use_cache") is False:
            outputs.past_key_values = model_kwargs.get("past_key_values")
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def memory_fingerprint(self) -> str:
        """Hash of the weights in bfloat16, with adapters merged, and of the settings that memory keys depend on."""
        config, versions = self.config, [(n, p.data_ptr(), p._version) for n, p in self.named_parameters()]
        settings = [config.mem_positionals, config.rope_parameters, config.mem_layers, config.max_position_embeddings]
        state = (versions, json.dumps(settings, default=str))
        cached = _FINGERPRINTS.get(self)
        if cached is not None and cached[0] == state:
            return cached[1]
        digest = xxhash.xxh3_128(json.dumps(settings, default=str, sort_keys=True).encode())
        # A tied head has its own name only where it is offloaded, so it must not count.
        tied = getattr(self, "all_tied_weights_keys", {})
        # Shared parameters count under each name, as they do in models that don't share them.
        named = [(n, p) for n, p in self.named_parameters(remove_duplicate=False) if n not in tied]
        for name, make in sorted(merged(self, named), key=lambda item: item[0]):
            parameter = make()
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            for part in parameter.detach().reshape(-1).split(_CHUNK_ELEMENTS):
                digest.update(part.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
        _FINGERPRINTS[self] = (state, digest.hexdigest())
        return digest.hexdigest()

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
        """Encode a document into a segment of a memory, window by window, and return the memory.

        The document sees no other segment. If the segment exists, the document continues it.

        Args:
            input_ids: the document's token ids.
            memory: the memory to add to; by default a new one. An interrupted call leaves it unchanged.
            segment: the segment's name.
            on_window: called after each window with the number of tokens encoded so far.

        Raises:
            LlamoryError: the model has no memory layers, or the memory is of another model.
        """
        self._check_memory(memory)
        memory = self.new_memory() if memory is None else memory
        ids = torch.as_tensor(input_ids, dtype=torch.long).flatten()
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
        """A cache with this memory attached; pass it as `past_key_values`, with only the question as input.

        The memory isn't changed; its blocks are shared. A LlamoryError if it is of another model.
        """
        self._check_memory(memory)
        return LongLlamaCache(self.config, memory)

    def _check_memory(self, memory: MemoryBank | None) -> None:
        config = self.config
        if not config.mem_layers:
            raise LlamoryError("This model has no memory layers; load it with mem_layers, for instance mem_layers=[8].")
        if memory is not None:
            fingerprint = self.memory_fingerprint() if memory.fingerprint else None
            heads = (config.num_key_value_heads, config.head_dim)
            memory.check_compatible("The memory", fingerprint=fingerprint, heads=heads, layers=config.mem_layers)


@torch.no_grad()
def encode_windows(
    model: LongLlamaForCausalLM, rows: Sequence[Tensor], banks: Sequence[MemoryBank], start: int = 0
) -> Iterator[int]:
    """Encode documents into memory window by window, in evaluation mode; no document attends to another.

    Args:
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
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(window) for window in windows])[:, None]
            cache = LongLlamaCache(model.config, [banks[index] for index in active])
            settings: dict[str, Any] = {"use_cache": False, "last_context_length": context, "logits_to_keep": None}
            inputs = ids.to(model.device), mask.to(model.device)
            model.model(*inputs, past_key_values=cache, **settings)
            yield min(first + context, longest)
    finally:
        model.train(training)


AutoModelForCausalLM.register(LongLlamaConfig, LongLlamaForCausalLM, exist_ok=True)
