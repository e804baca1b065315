"""Training a small model from scratch on dictionary look-up (Tworkowski et al. 2023, section 4.1).

The number of documents that a question attends to increases once the training accuracy reaches a threshold. Before
that, training uses short documents, on which attention to memory is learned in a fraction of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import BOS, EOS, LookupTask, save_task
from llamory.longllama.causal import LongLlamaForCausalLM
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.settings import LookupSettings
from llamory.training.streaming import Curriculum, StreamingTrainer, setup_run

_INITIALIZER_RANGE = 0.05  # small models learn faster than with the usual 0.02


def train_lookup(settings: LookupSettings) -> dict[str, Any]:
    """Train the model and save it as a LongLLaMA in `settings.output`.

    Returns the output folder, the number of steps, the last loss and accuracy, and the final number of documents.
    Raises LlamoryError if settings, checkpoint or output folder can't be used, or a loss is not finite.
    """
    task, config, curriculum = _task_and_model(settings)
    run_context = setup_run(settings, has_eval_data=False)
    result = run_context.train_and_save(
        LookupTrainer,
        "Dictionary look-up",
        model=LongLlamaForCausalLM(config),
        batch_source=LookupBatchSource(task, curriculum, settings, run_context.arguments.process_index),
        logged_metrics=("loss", "accuracy"),
        curriculum=curriculum,
    )
    return result | {"documents_seen": curriculum.stage[1]}


def _task_and_model(settings: LookupSettings) -> tuple[LookupTask, LongLlamaConfig, Curriculum[tuple[int, int]]]:
    """The task, the model's configuration, and the stages of (lines of a document, documents)."""
    task = LookupTask(settings.vocabulary, settings.key_length, settings.value_length, settings.row_length)
    if settings.lines and max(settings.lines) >= task.lines:
        raise LlamoryError(f"lines must be below the {task.lines} lines of a full row, not {settings.lines}.")
    required_keys = max(settings.batch_size, *settings.sizes) * task.lines
    if settings.confusable and required_keys > task.all_keys:
        keys = f"{required_keys} distinct keys and there are {task.all_keys}"
        raise LlamoryError(f"Confusable documents need {keys}; set confusable to 0, or a larger key_length.")
    config = LongLlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=max(8, settings.hidden_size * 8 // 24 * 8),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=settings.row_length,
        last_context_length=settings.row_length,
        mem_layers=[settings.mem_layer],
        # As in the paper, memory layers have no positions, since a key's meaning does not depend on its position.
        mem_positionals=False,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    save_task(config, task)
    stages = [((count, 1), settings.advance_lines_at_accuracy) for count in settings.lines]
    stages += [((task.lines, size), settings.advance_at_accuracy) for size in settings.sizes]
    return task, config, Curriculum(stages)


class LookupBatchSource:
    """Definitions of the documents that questions attend to, and questions about some of them."""

    def __init__(
        self, task: LookupTask, curriculum: Curriculum[tuple[int, int]], settings: LookupSettings, process: int
    ) -> None:
        self.task, self.curriculum, self.settings = task, curriculum, settings
        self.streams = range(process * settings.accumulation, (process + 1) * settings.accumulation)

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """A batch of each stream, determined by the step and the stage."""
        return [self._micro_batch(step, stream) for stream in self.streams]

    def _micro_batch(self, step: int, stream: int) -> dict[str, Any]:
        lines, context_size = self.curriculum.stage
        full = self.task.lines
        task = self.task if lines == full else self.task.with_lines(lines)
        num_queries = self.settings.batch_size * (full // lines)  # as many tokens with short documents
        seed = np.random.default_rng([self.settings.seed, step, stream]).integers(2**63)
        generator = torch.Generator().manual_seed(int(seed))
        # Keys that differ in one token: few documents simulate a large memory.
        confusable = self.curriculum.is_last and float(torch.rand((), generator=generator)) < self.settings.confusable
        if confusable:
            context_size = min(context_size, self.settings.confusable_documents)
        documents = max(num_queries, context_size)
        dictionaries = (task.draw_confusable if confusable else task.draw)(documents, generator)
        questions, values = task.questions(dictionaries[:num_queries], generator)
        rows = torch.cat([task.definitions(dictionaries), questions])
        contexts: list[list[int]] = [[] for _ in range(documents)]
        contexts += [[(row + other) % documents for other in range(context_size)] for row in range(num_queries)]
        answers, targets = torch.full_like(rows, IGNORE_INDEX), torch.full_like(rows, IGNORE_INDEX)
        answers[documents:] = targets[documents:] = values
        if lines < full:
            # The later tokens of a key follow from its first ones; this easier look-up is learned first.
            last = 1 + lines * task.line
            targets[documents:, : last - 1] = questions[:, 1:last]
        return {"input_ids": rows, "shift_labels": targets, "contexts": contexts, "answers": answers}

    def state_dict(self) -> dict[str, Any]:
        """State of the curriculum; all else follows from the step."""
        return {"streams": {}, "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self.curriculum.load_state_dict(state["curriculum"])


class LookupTrainer(StreamingTrainer):
    """Advances the curriculum with the accuracy of the answers."""

    def __init__(self, *args: Any, curriculum: Curriculum[tuple[int, int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curriculum = curriculum

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The next-token loss of the questions; the curriculum observes the accuracy of each step."""
        inputs = dict(inputs)
        answers = inputs.pop("answers")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        accuracy = self.step_accuracy(outputs["hidden_states"][0], answers)
        if accuracy is not None:
            self.curriculum.observe(accuracy)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the accuracy, the lines of a document and the number of documents."""
        if "loss" in logs:
            lines, context_size = self.curriculum.stage
            logs |= {"accuracy": round(self.curriculum.mean, 4), "lines": lines, "contexts": context_size}
        super().log(logs, *args, **kwargs)
