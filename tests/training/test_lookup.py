"""Training the dictionary task: it learns, it grows, it goes on where it was killed."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import LookupTask, load_task
from llamory.longllama import LongLlamaForCausalLM
from llamory.training.lookup import LookupBatchSource, _task_and_model, train_lookup
from llamory.training.settings import LookupSettings
from llamory.training.streaming import Curriculum

TINY = {
    "vocabulary": 16,
    "key_length": 1,
    "value_length": 1,
    "row_length": 13,
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "kv_heads": 1,
    "lines": [1],
    "sizes": [1, 2, 4],
    "confusable": 0.0,
    "batch_size": 4,
    "log_every": 1,
    "cpu": True,
    "quiet": True,
}


def settings(path, **changes):
    return LookupSettings(output=str(path), **TINY | changes)


def test_growth_goes_on_at_the_accuracy_of_each_stage():
    curriculum = Curriculum([((1, 1), 0.5), ((2, 1), 0.9), ((3, 1), 0.9)])
    for _ in range(9):
        curriculum.observe(0.6)
    assert curriculum.stage[0] == 1  # ten steps at least
    curriculum.observe(0.6)
    assert curriculum.stage[0] == 2
    for _ in range(30):
        curriculum.observe(0.8)
    assert curriculum.stage[0] == 2
    kept = Curriculum(curriculum.stages)
    kept.load_state_dict(json.loads(json.dumps(curriculum.state_dict())))
    steps = 0
    while curriculum.stage[0] == 2:
        curriculum.observe(1.0)
        kept.observe(1.0)
        steps += 1
    # What is missing of 1.0, 0.2 at first, must become less than 0.1: 0.9 to the 7th is the first power below a half.
    assert steps == 7 and kept.stage == curriculum.stage
    for _ in range(20):
        curriculum.observe(1.0)
    assert curriculum.stage[0] == 3


@pytest.mark.parametrize("short", [False, True])
def test_a_question_sees_its_own_definitions_and_so_many_others(tmp_path, short):
    config = settings(tmp_path)
    curriculum = Curriculum([((4, 3), 1.0)])
    shape = LookupTask(16, 1, 1, 33 if short else 17)  # eight lines, of which four are taken, or four
    (batch,) = LookupBatchSource(shape, curriculum, config, 0).micro_batches(7)
    (same,) = LookupBatchSource(shape, curriculum, config, 0).micro_batches(7)
    assert torch.equal(batch["input_ids"], same["input_ids"])
    rows, contexts = batch["input_ids"], batch["contexts"]
    documents = len(rows) - (8 if short else 4)
    assert contexts[:documents] == [[]] * documents
    for number, row in enumerate(range(documents, len(rows))):
        assert contexts[row][0] == number and len(set(contexts[row])) == 3 and max(contexts[row]) < documents
        # What is asked is defined in the row's first context: marks aside, the same symbols stand in both.
        assert sorted(t for t in rows[row].tolist() if t > 5) == sorted(t for t in rows[number].tolist() if t > 5)
        learned, asked = batch["shift_labels"][row], batch["answers"][row] != -100
        assert torch.equal(
            learned[:16] if short else learned[asked], rows[row, 1:17] if short else rows[row, 1:][asked[:-1]]
        )
        assert torch.equal(batch["answers"][row][asked], learned[asked]) and asked.sum() == 4
        assert short or (learned != -100).sum() == 4
    assert (batch["shift_labels"][:documents] == -100).all()


def test_crowded_steps_come_at_the_last_size_and_see_fewer_documents(tmp_path):
    config = LookupSettings(output=str(tmp_path), batch_size=2, confusable=1.0, confusable_documents=3)
    task = LookupTask()
    seen, symbols = [], []
    for stages in ([((25, 5), 1.0), ((25, 5), 1.0)], [((25, 5), 1.0)]):
        (batch,) = LookupBatchSource(task, Curriculum(stages), config, 0).micro_batches(0)
        seen.append({len(rows) for rows in batch["contexts"]})
        first = batch["input_ids"][0, 2:6]  # a key: behind bos and a mark
        keys = torch.stack([row[2 + 10 * line : 6 + 10 * line] for row in batch["input_ids"] for line in range(25)])
        assert torch.equal(keys[0], first)
        symbols.append(len(keys.unique()))
    # The smallest number whose fourth power is twice 75 keys is 4, where all 58 would be used at random.
    assert seen == [{0, 5}, {0, 3}] and symbols[0] > 40 and symbols[1] == 4


def test_it_learns_and_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    whole = train_lookup(settings(tmp_path / "whole", steps=60, learning_rate=5e-3, save_every=25))
    history = json.loads((tmp_path / "whole" / "checkpoint-60" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    model = LongLlamaForCausalLM.from_pretrained(tmp_path / "whole")
    assert load_task(model.config).key_length == 1 and model.config.mem_layers == [1]

    real = LookupBatchSource.micro_batches

    def killed(self, step):
        if step == 40:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(LookupBatchSource, "micro_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        train_lookup(settings(tmp_path / "cut", steps=60, learning_rate=5e-3, save_every=25))
    monkeypatch.undo()
    resumed = train_lookup(settings(tmp_path / "cut", steps=60, learning_rate=5e-3, save_every=25, resume=True))
    assert resumed["losses"] == whole["losses"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sizes": []}, "sizes is invalid: Value should have at least 1 item"),
        ({"sizes": [4, 2]}, "from small to large"),
        ({"lines": [5]}, "lines must be below"),
        ({"advance_at_accuracy": 1.5}, "advance_at_accuracy must be at most 1"),
        ({"mem_layer": 2}, "names layer 2"),
        ({"heads": 3}, "heads must divide hidden_size"),
        ({"row_length": 4}, "A dictionary needs"),
        ({"steps": None}, "steps is invalid: .*valid integer"),
        ({"confusable": 0.5}, "Confusable documents need"),
        ({"confusable": 2.0}, "confusable must be at most 1"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, sentence):
    with pytest.raises(LlamoryError, match=sentence):
        train_lookup(settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_data_depend_on_numpys_generator_and_not_on_pythons_hash(tmp_path):
    made = settings(tmp_path / "out", seed=3)
    task, _, curriculum = _task_and_model(made)
    batch = LookupBatchSource(task, curriculum, made, 0).micro_batches(5)[0]
    seed = int(np.random.default_rng([3, 5, 0]).integers(2**63))
    generator = torch.Generator().manual_seed(seed)
    short = task.with_lines(1)
    documents = len(batch["input_ids"]) // 2
    assert torch.equal(batch["input_ids"][:documents], short.definitions(short.draw(documents, generator)))
