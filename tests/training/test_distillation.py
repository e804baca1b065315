"""A teacher of short contexts: its loss, and what it keeps."""

import json
import math
import random
import shutil

import pytest
import torch
from transformers import LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.losses import teacher_loss
from llamory.training.distillation import Teacher
from llamory.training.fot.train import train_fot
from llamory.training.instruct.train import train_instruct
from llamory.training.settings import FotSettings, InstructSettings
from training_runs import losses

ROW, ROWS = 16, 8


@pytest.fixture(scope="module")
def other_folder(model_folder, tmp_path_factory):
    """The tiny model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(5)
    model = LlamaForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def common(model_folder, tmp_path):
    return {
        "model": str(model_folder),
        "output": str(tmp_path / "run"),
        "mem_layers": [1],
        "row_length": ROW,
        "batch_size": ROWS,
        "accumulation": 1,
        "steps": 2,
        "learning_rate": 3e-3,
        "log_every": 1,
        "save_every": 2,
        "cpu": True,
        "quiet": True,
    }


@pytest.fixture
def fot_settings(common, documents):
    def make(**changes):
        return FotSettings(
            **(common | {"data": [str(documents)], "min_length": 1, "crossbatch_schedule": ["0+0", "1+1"]} | changes)
        )

    return make


@pytest.fixture
def instruct_settings(common, tmp_path):
    chance, words = random.Random(0), "river stone bridge winter garden letter".split()
    lines = []
    for _ in range(40):
        asked = chance.choices(words, k=chance.randint(2, 12))
        lines.append(json.dumps({"question": " ".join(asked), "response": asked[0]}))
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(lines))

    def make(**changes):
        lengths = {"last_context_length": 12, "total_length": 40}
        return InstructSettings(**(common | lengths | {"data": [str(file)]} | changes))

    return make


def plain_divergence(student, teacher, ids, mask):
    """The sum over the vocabulary of p · log(p / q), place by place."""
    total, count = 0.0, 0
    for row in range(len(ids)):
        for place in range(ids.shape[1]):
            if mask[row, place]:
                p = torch.softmax(teacher[row, place].double(), 0)
                q = torch.softmax(student[row, place].double(), 0)
                total += float((p * (p / q).log()).sum())
                count += 1
    return total / count


def test_the_loss_is_the_mean_divergence_of_real_places_and_has_its_gradient():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 5, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(3, 5, 11, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    loss = teacher_loss(student, teacher, mask)
    assert float(loss.detach()) == pytest.approx(plain_divergence(student, teacher, torch.zeros(3, 5), mask), rel=1e-5)
    loss.backward()
    # d KL(p‖softmax(z)) / dz = softmax(z) - p
    expected = (student.softmax(-1) - teacher.softmax(-1)) * mask[..., None] / mask.sum()
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("turn", [0, 1, 3])
def test_some_rows_are_read_without_memory_in_turns(model_folder, other_folder, turn):
    student = LongLlamaForCausalLM.from_pretrained(
        model_folder, mem_layers=[1], max_position_embeddings=ROW, last_context_length=4, dtype=torch.float32
    )
    teacher = LlamaForCausalLM.from_pretrained(other_folder, dtype=torch.float32)
    ids = torch.randint(5, 100, (5, ROW), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = mask[3, 3:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "contexts": [[1], [2], [3], [4], []]}
    found = Teacher(teacher, 2).loss(student, batch, turn)
    rows = [(2 * turn) % 5, (2 * turn + 1) % 5]
    plain = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)  # no memory there
    with torch.no_grad():
        own, wanted = (model(ids[rows], attention_mask=mask[rows]).logits for model in (plain, teacher))
    assert float(found) == pytest.approx(plain_divergence(own, wanted, ids[rows], mask[rows]), rel=1e-4)


@pytest.mark.parametrize("train", ["fot", "instruct"])
def test_what_it_adds_to_the_loss_is_logged(request, train, other_folder, tmp_path):
    settings, run = request.getfixturevalue(f"{train}_settings"), {"fot": train_fot, "instruct": train_instruct}[train]
    taught = settings(teacher=str(other_folder), teacher_weight=3.0, teacher_rows=100, lora=True)
    alone = settings(output=str(tmp_path / "alone"), lora=True)
    run(taught)
    run(alone)
    divergence = losses(taught.output, "teacher_loss")
    assert len(divergence) == 2 and divergence[0] > 0.01
    assert losses(taught.output)[0] == pytest.approx(losses(alone.output)[0] + 3 * divergence[0], rel=1e-3)
    assert losses(alone.output, "teacher_loss") == []


def test_short_contexts_stay_where_the_teacher_is(instruct_settings, model_folder, tmp_path):
    def moved(**changes):
        made = instruct_settings(steps=30, save_every=30, output=str(tmp_path / str(len(changes))), **changes)
        train_instruct(made)
        trained = LongLlamaForCausalLM.from_pretrained(made.output, dtype=torch.float32)
        before = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        ids = torch.randint(5, 100, (4, ROW), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            return plain_divergence(trained(ids).logits, before(ids).logits, ids, torch.ones_like(ids))

    assert moved(teacher=str(model_folder), teacher_weight=10.0) < moved() / 2


def test_passes_share_its_weight(instruct_settings, other_folder, tmp_path):
    one = instruct_settings(teacher=str(other_folder), accumulation=2, steps=1)
    train_instruct(one)
    alone = instruct_settings(accumulation=2, steps=1, output=str(tmp_path / "alone"))
    train_instruct(alone)
    added = losses(one.output)[0] - losses(alone.output)[0]
    assert added == pytest.approx(losses(one.output, "teacher_loss")[0], rel=1e-3)
    assert math.isfinite(added) and added > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"teacher_rows": 0}, "teacher_rows must be at least 1"),
        ({"teacher_weight": -1.0}, "teacher_weight must be at least 0"),
        ({"teacher": "nowhere"}, "nowhere"),
    ],
)
def test_a_teacher_that_cannot_be_is_refused(instruct_settings, fot_settings, changes, sentence):
    for run, settings in ((train_instruct, instruct_settings), (train_fot, fot_settings)):
        with pytest.raises(LlamoryError, match=sentence):
            run(settings(**changes))


def test_a_teacher_of_another_vocabulary_is_refused(instruct_settings, other_folder, tmp_path):
    folder = tmp_path / "larger"
    shutil.copytree(other_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    size = config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": size + 1}))
    with pytest.raises(LlamoryError, match=rf"has {size + 1:,} tokens, the model {size:,}"):
        train_instruct(instruct_settings(teacher=str(folder)))
