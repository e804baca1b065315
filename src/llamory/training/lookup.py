"""Training a small model from scratch on dictionary look-up (Tworkowski et al. 2023, section 4.1).

As in the paper, the number of documents that a question sees grows once training accuracy is reached. Before that,
documents of a few lines are num_queries about: among four values a first guess is right so often that attention to memory
soon pays, which in whole documents takes many times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import BOS, EOS, LookupTask, save_task
from llamory.longllama.causal import LongLlamaForCausalLM
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.curriculum import Curriculum
from llamory.training.run import check_settings
from llamory.training.settings import LookupSettings
from llamory.training.streaming import StreamingTrainer, setup_run

_INITIALIZER_RANGE = 0.05  # of the weights: small models start faster than with the usual 0.02


def train_lookup(settings: LookupSettings) -> dict[str, Any]:
    """Train the model and save it as a LongLLaMA in `settings.output`.

    Returns:
        The output folder, steps done, the last loss and accuracy, and how many documents questions saw in the end.

    Raises:
        LlamoryError: settings, checkpoint or output folder that can't be used, or a loss that isn't finite.
    """
    task, config, curriculum = _check(settings)
    run_context = setup_run(settings, has_eval_data=False)
    batch_source = LookupBatchSource(task, curriculum, settings, run_context.arguments.process_index)
    result = run_context.train_and_save(
        LookupTrainer,
        "Dictionary look-up",
        model=LongLlamaForCausalLM(config),
        batch_source=batch_source,
        logged_metrics=("loss", "accuracy"),
        curriculum=curriculum,
    )
    return result | {"documents_seen": curriculum.stage[1]}


def _check(settings: LookupSettings) -> tuple[LookupTask, LongLlamaConfig, Curriculum[tuple[int, int]]]:
    check_settings(settings, ["hidden_size", "layers", "heads", "kv_heads", "confusable_documents"])
    if settings.steps is None:
        raise LlamoryError("Made-up documents have no end; set steps.")
    task = LookupTask(settings.vocabulary, settings.key_length, settings.value_length, settings.row_length)
    sizes, lines = list(settings.sizes), list(settings.lines)
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        raise LlamoryError(f"sizes must be numbers of documents from small to large, at least 1, not {sizes}.")
    if lines and (min(lines) < 1 or lines != sorted(set(lines)) or max(lines) >= task.lines):
        raise LlamoryError(f"lines must go from small to large, below the {task.lines} of a whole row, not {lines}.")
    if not 0 <= settings.confusable <= 1:
        raise LlamoryError(f"confusable is a share from 0 to 1, not {settings.confusable}.")
    required_keys = max(settings.batch_size, *sizes) * task.lines
    if settings.confusable and required_keys > task.all_keys:
        raise LlamoryError(
            f"Crowded keys are all different, but {required_keys} are wanted and there are {task.all_keys}; set confusable to 0, "
            "or take longer keys."
        )
    for name in ("advance_at_accuracy", "advance_lines_at_accuracy"):
        if not 0 < getattr(settings, name) <= 1:
            raise LlamoryError(f"{name} is an accuracy above 0 and up to 1, not {getattr(settings, name)}.")
    if settings.hidden_size % settings.heads or settings.heads % settings.kv_heads:
        raise LlamoryError(
            f"Heads must divide the width and key/value heads the heads, not {settings.hidden_size}, {settings.heads} "
            f"and {settings.kv_heads}."
        )
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
        # What a key means doesn't depend on where it stands, so memory layers do without positions, as the paper's do.
        mem_positionals=False,
        initializer_range=_INITIALIZER_RANGE,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    save_task(config, task)
    stages = [((count, 1), settings.advance_lines_at_accuracy) for count in lines]
    stages += [((task.lines, size), settings.advance_at_accuracy) for size in sizes]
    return task, config, Curriculum(stages)


class LookupBatchSource:
    """Definitions of as many documents as a question sees, and questions about some of them."""

    def __init__(
        self, task: LookupTask, curriculum: Curriculum[tuple[int, int]], settings: LookupSettings, process: int
    ) -> None:
        self.task, self.curriculum, self.settings = task, curriculum, settings
        self.streams = range(process * settings.accumulation, (process + 1) * settings.accumulation)

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """A batch of each stream: the same for the same step and stage, whatever was before."""
        return [self._micro_batch(step, stream) for stream in self.streams]

    def _micro_batch(self, step: int, stream: int) -> dict[str, Any]:
        lines, seen = self.curriculum.stage
        whole = self.task.lines
        # Short documents: as many tokens as of long ones.
        task = self.task if lines == whole else self.task.with_lines(lines)
        num_queries = self.settings.batch_size * (whole // lines)
        generator = torch.Generator().manual_seed(hash((self.settings.seed, step, stream)) % 2**63)
        # Keys that differ in a token only teach what large memories ask for, from few documents.
        confusable = self.curriculum.is_last and float(torch.rand((), generator=generator)) < self.settings.confusable
        if confusable:
            seen = min(seen, self.settings.confusable_documents)
        documents = max(num_queries, seen)
        dictionaries = (task.draw_confusable if confusable else task.draw)(documents, generator)
        questions, wanted = task.questions(dictionaries.first(num_queries), generator)
        rows = torch.cat([task.definitions(dictionaries), questions])
        contexts: list[list[int]] = [[] for _ in range(documents)]
        contexts += [[(row + other) % documents for other in range(seen)] for row in range(num_queries)]
        answers, targets = torch.full_like(rows, IGNORE_INDEX), torch.full_like(rows, IGNORE_INDEX)
        answers[documents:] = targets[documents:] = wanted
        if lines < whole:
            # A key's later tokens can be looked up by the earlier ones, which is learned first and leads to the rest.
            last = 1 + lines * task.line
            targets[documents:, : last - 1] = questions[:, 1:last]
        return {"input_ids": rows, "shift_labels": targets, "contexts": contexts, "answers": answers}

    def state_dict(self) -> dict[str, Any]:
        """How far the documents have grown; the rest follows from the step."""
        return {"streams": {}, "curriculum": self.curriculum.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.curriculum.load_state_dict(state["curriculum"])


class LookupTrainer(StreamingTrainer):
    """Lets the documents grow with the accuracy of the answers."""

    def __init__(self, *args: Any, curriculum: Curriculum[tuple[int, int]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.curriculum = curriculum

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The next-token loss of the questions; after a step's last pass its accuracy is heard."""
        inputs = dict(inputs)
        answers = inputs.pop("answers")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        accuracy = self.step_accuracy(outputs["hidden_states"][0], answers)
        if accuracy is not None:
            self.curriculum.observe(accuracy)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add accuracy, lines of a document and documents seen."""
        if "loss" in logs:
            lines, seen = self.curriculum.stage
            logs |= {"accuracy": round(self.curriculum.mean, 4), "lines": lines, "contexts": seen}
        super().log(logs, *args, **kwargs)
