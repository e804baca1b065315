"""LLARA's models: a LLaMA that encodes passages with both prompts in one pass, and its training losses.

Li et al. 2023 (arXiv:2312.15503), section 3. For inputs without prompts they equal plain LLaMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from llamory.errors import LlamoryError
from llamory.llara.attention import LlaraAttention, additive_mask
from llamory.llara.layout import SequenceLayout, find_layout
from llamory.llara.losses import IGNORE_INDEX, BagOfWords, bag_of_words, head_losses
from llamory.llara.template import LlaraTemplate


@dataclass
class LlaraOutput(CausalLMOutputWithPast):
    """Llama's output with each loss of LLARA."""

    ar_loss: Tensor | None = None  # mean next-token loss over the passage tokens
    bow_summarize_loss: Tensor | None = None  # bag-of-words loss with its weight; `loss` has the heads' mean
    bow_predict_loss: Tensor | None = None


class NewLlamaModel(LlamaModel):
    """A LlamaModel whose prediction blocks don't attend to the summary block before them and start at its position."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = LlaraAttention(config, index)
        self.template = LlaraTemplate.from_config(config)
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,  # noqa: ARG002
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Llama's forward; with `layout` the hidden states are those of the batch's N real tokens, (1, N, hidden)."""
        # `eager` attention, attention maps and a cache take the padded batch and an explicit mask; all else is computed
        # flat, without padding and without a (length × length) mask.
        kwargs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs = {key: value for key, value in (kwargs | {"return_dict": return_dict}).items() if value is not None}
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        custom_mask = attention_mask is not None and attention_mask.ndim == 4
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # A decoding step has no prompts; its attention mask says what the token attends to.
        plain = input_ids is None or inputs_embeds is not None or custom_mask or (past and input_ids.shape[1] == 1)
        if layout is None and input_ids is not None and not plain:
            mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            found = find_layout(input_ids, self.template, mask, position_ids)
            flat = not (past or use_cache or output_attentions or self.config._attn_implementation == "eager")
            if flat and (found.has_blocks or found.is_packed or self.training):
                return self._forward_padded(input_ids, found, kwargs)
            if found.has_blocks or found.is_packed:
                position_ids, attention_mask = self._padded_mask(
                    found, attention_mask, position_ids, past_key_values, past
                )
        if layout is not None:
            assert input_ids is not None
            # Flat ids keep padding out of the embedding's gradient too; a 4-D mask keeps transformers from making one.
            input_ids = input_ids.flatten().index_select(0, layout.index)[None]
            attention_mask, position_ids = input_ids.new_empty(0, 0, 0, 0), layout.position_ids[None]
            use_cache, kwargs = False, kwargs | {"layout": layout}
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        return super().forward(**inputs, **kwargs)

    def _forward_padded(
        self, input_ids: Tensor, layout: SequenceLayout, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPast | tuple:
        """Compute flat, and scatter the result to the input's shape."""
        output = self.forward(input_ids, layout=layout, **kwargs | {"return_dict": True})
        assert isinstance(output, BaseModelOutputWithPast) and output.last_hidden_state is not None
        padded = BaseModelOutputWithPast(last_hidden_state=layout.pad(output.last_hidden_state[0]))
        if output.hidden_states is not None:
            padded.hidden_states = tuple(layout.pad(state[0]) for state in output.hidden_states)
        return padded if kwargs.get("return_dict", True) else padded.to_tuple()

    def _padded_mask(
        self, layout: SequenceLayout, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None, past: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Positions and mask of a padded batch, additive where causal attention would be wrong."""
        if not (layout.has_tail or layout.is_packed):
            return position_ids, mask
        if "flash" in str(self.config._attn_implementation) or self.config._attn_implementation == "flex_attention":
            raise LlamoryError("A cache with both prompts needs sdpa or eager attention; else pass use_cache=False.")
        positions = layout.pad(layout.position_ids) + (past if position_ids is None else 0)
        total = past + layout.shape[1] if cache is None else cache.get_mask_sizes(layout.shape[1], 0)[0]
        return positions, additive_mask(layout, self.dtype, mask, past, total)


class PreLlamaModel(LlamaForCausalLM):
    """A LlamaForCausalLM with LLARA's attention and losses, and with its state-dict keys.

    With `bow_weighting="learned"` there is one key more, `bow_log_variance` s (2,): the bag-of-words loss of head i is
    weighted by exp(-s_i) and s_i is added (Kendall et al. 2018, arXiv:1705.07115), starting from the fixed weight.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.head_trainable = True  # whether the output head gets a gradient; False with adapters, even if it is tied
        self.model = NewLlamaModel(config)
        if self.template is not None:
            self.use_template(self.template)
        self.post_init()

    def use_template(self, template: LlaraTemplate) -> None:
        """Set the model's template; `LlaraTemplate.prepare_model` also adds the slots' embeddings."""
        self.model.template = template
        if template.bow_weighting == "learned" and not hasattr(self, "bow_log_variance"):
            self.bow_log_variance = nn.Parameter(torch.full((2,), 1 / template.bow_weight).log())

    @property
    def template(self) -> LlaraTemplate | None:
        """The template of `config.llara`; None for a checkpoint that has none."""
        return self.model.template

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_summarize_ids: Tensor | None = None,
        output_predict_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,  # noqa: ARG002
        skip_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> LlaraOutput | tuple:
        """Encode passages with their prompts; with targets, compute the losses. Further arguments are Llama's.

        Args:
            input_ids: (batch, length); a row holds a passage with both prompts, one or none, or several of these.
            attention_mask: (batch, length), 0 at padding on either side; None: all tokens are real.
            position_ids: (batch, length); where they restart at 0, another packed passage begins.
            inputs_embeds: (batch, length, hidden) in place of ids; prompts are not found then.
            labels: (batch, length) passage tokens, -100 elsewhere.
            output_summarize_ids, output_predict_ids: (passages, longest target) ids of the target words, one row per
                passage, padded with special or negative ids; order and repeats have no effect.
            use_cache: by default the config's setting, or False if there are targets.
            output_attentions: needs `attn_implementation="eager"`.
            skip_logits: return no logits; by default while training with targets.
            num_items_in_batch: divisors of the loss sums if one optimization step spans several batches: (3,) passage
                tokens, passages with a summary target, passages with a prediction target; a number is the first one.

        Raises:
            LlamoryError: all targets are empty, there are targets without slots, or the checkpoint has no template.
        """
        compute_losses = labels is not None or output_summarize_ids is not None or output_predict_ids is not None
        if skip_logits is None:
            skip_logits = self.training and compute_losses
        layout = None
        if compute_losses:
            if input_ids is None:
                raise LlamoryError("LLARA's losses need input_ids: the slots are found by their ids.")
            use_cache = use_cache or False
            layout = find_layout(input_ids, self.template, attention_mask, position_ids)
        needs_padding = use_cache or output_attentions or output_hidden_states or past_key_values is not None
        flat = layout is not None and not needs_padding and self.config._attn_implementation != "eager"
        kwargs |= {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        kwargs |= {"return_dict": True, "layout": layout if flat else None}
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        output = self.model(*inputs, **kwargs)
        hidden = output.last_hidden_state
        result = LlaraOutput(
            past_key_values=output.past_key_values, hidden_states=output.hidden_states, attentions=output.attentions
        )
        if layout is not None:
            targets = (labels, output_summarize_ids, output_predict_ids)
            self._add_losses(result, hidden[0] if flat else layout.flatten(hidden), layout, targets, num_items_in_batch)
        if not skip_logits:
            keep = slice(-logits_to_keep or None, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = self.lm_head((layout.pad(hidden[0]) if layout is not None and flat else hidden)[:, keep])
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def _add_losses(
        self,
        result: LlaraOutput,
        hidden: Tensor,
        layout: SequenceLayout,
        targets: Sequence[Tensor | None],
        num_items: Tensor | int | None,
    ) -> None:
        """Set the losses in `result`; `targets` are labels, ids of the summary's and of the prediction's words."""
        rows = next_tokens = layout.index[:0]
        if targets[0] is not None:
            flat_labels = layout.flatten(targets[0])
            is_target = flat_labels != IGNORE_INDEX
            is_target[layout.offsets] = False  # no token of the same passage predicts its first one
            indices = is_target.nonzero().squeeze(1)
            rows, next_tokens = indices - 1, flat_labels[indices]
        bags = [
            self._bag("summary", layout, layout.summarize_slots, layout.summarize_segments, targets[1]),
            self._bag("prediction", layout, layout.predict_slots, layout.predict_segments, targets[2]),
        ]
        local_counts = torch.tensor([len(rows), 0, 0], device=hidden.device)
        for i, bag in enumerate(bags, start=1):
            if bag is not None:
                local_counts[i] = bag.valid.any(1).sum()
        counts = local_counts
        if num_items is not None:
            counts = torch.as_tensor(num_items, device=hidden.device)
            counts = counts if counts.ndim else torch.cat([counts[None], local_counts[1:]])
        elif not bool(local_counts.any()):
            raise LlamoryError("There is nothing to learn from: no label is a token and no target word is left.")
        weights, penalty = self._loss_weights(counts)
        head = self.lm_head.weight if self.head_trainable else self.lm_head.weight.detach()
        total, losses = head_losses(hidden, head, weights, rows, next_tokens, counts.float(), *bags)
        result.loss = total + penalty
        scaled = losses * torch.cat([weights.new_ones(1), self._bow_weights()]).detach()
        result.ar_loss, result.bow_summarize_loss, result.bow_predict_loss = (
            None if target is None else loss for target, loss in zip(targets, scaled.unbind(), strict=True)
        )

    def _bow_weights(self) -> Tensor:
        """(2,) weight of the summary and the prediction head's bag-of-words loss."""
        if hasattr(self, "bow_log_variance"):
            return torch.exp(-self.bow_log_variance.float())
        weight = self.template.bow_weight if self.template is not None else 0.0
        return torch.full((2,), weight, device=self.lm_head.weight.device)

    def _loss_weights(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(3,) factors of the losses in their sum, the penalty of learned weights. Heads with targets are averaged."""
        has_targets = (counts[1:] > 0).float()
        head_weights = has_targets / has_targets.sum().clamp(min=1)
        weights = torch.cat([head_weights.new_ones(1), self._bow_weights() * head_weights])
        if hasattr(self, "bow_log_variance"):
            return weights, (self.bow_log_variance.float() * head_weights).sum()
        return weights, head_weights.new_zeros(())

    def _bag(
        self, name: str, layout: SequenceLayout, slots: Tensor, segments: Tensor, targets: Tensor | None
    ) -> BagOfWords | None:
        """Join a head's slots with its targets: one row of targets per block, or one per passage."""
        if targets is None:
            return None
        if self.template is None:
            raise LlamoryError("This checkpoint has no LLARA template; add one with LlaraTemplate.prepare_model.")
        if len(targets) != len(slots):
            if len(targets) != len(layout.segments):
                raise LlamoryError(f"{len(targets)} rows of {name} targets don't fit {len(layout.segments)} passages.")
            targets = targets[segments]
        if not len(slots):
            raise LlamoryError(f"There are {name} targets, but no passage has a whole {name} prompt with its slots.")
        ignored = torch.tensor(self.template.ignored_ids, device=targets.device, dtype=targets.dtype)
        return bag_of_words(slots, targets, ignored)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Llama's; tokens generated after both prompts continue the prediction block, without the summary block."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask = inputs.get("attention_mask")
        step = inputs["input_ids"].shape[1] if inputs.get("input_ids") is not None else 0
        if self.template is None or step != 1 or input_ids.shape[1] <= step or mask is None or mask.ndim != 2:
            return inputs
        mask = mask[:, : input_ids.shape[1]]
        layout = find_layout(input_ids, self.template, mask, (mask.long().cumsum(-1) - 1).clamp(min=0))
        if layout.has_tail:
            inputs["attention_mask"] = layout.visible()[:, 0, -1].to(mask.dtype)
            inputs["position_ids"] = layout.pad(layout.position_ids)[:, -1:]
        return inputs


class PreModel(nn.Module):
    """The published wrapper around a pretraining model."""

    def __init__(self, model: Any = None):
        super().__init__()
        self.model = model

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations in the backward pass to save memory."""
        self.model.gradient_checkpointing_enable(**kwargs)

    def enable_input_require_grads(self, **kwargs: Any) -> None:
        """Let gradients flow to the input embeddings (needed by adapters with checkpointing)."""
        self.model.enable_input_require_grads(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward."""
        return self.model(*args, **kwargs)

    def save(self, output_dir: str | Path) -> None:
        """Save weights (safetensors) and config of the wrapped model to a folder."""
        state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
        self.model.save_pretrained(output_dir, state_dict=state)
