"""Instruction tuning: what it learns, saves, resumes, and shares among processes."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from llamory.cli.settings import read_settings
from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.instruct.batches import FrozenContextBatches, InstructBatches, MemorySplit, log_interpolate
from llamory.training.instruct.dataset import InstructFormat, Lengths, load_instructions
from llamory.training.instruct.train import InstructBatchSource, train_instruct
from llamory.training.settings import InstructSettings
from training_runs import TORCHRUN, finish, kill_behind, losses, start, weights

RECIPES = Path(__file__).parents[3] / "recipes"
ROW, LAST, TOTAL, ROWS = 16, 12, 40, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files: instructions and published chats, whose answers say the question's first word again."""
    folder, chance = tmp_path_factory.mktemp("instructions"), random.Random(0)
    words = "river stone bridge winter garden letter".split()

    def question():
        asked = chance.choices(words, k=chance.randint(2, 12))
        return " ".join(asked), asked[0]

    instructions, chats = [], []
    for _ in range(40):
        asked, answer = question()
        instructions.append({"question": asked, "response": answer})
        asked, answer = question()
        chats.append({"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]})
    for name, objects in (("instructions", instructions), ("chats", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in objects))
    return [str(folder / "instructions.jsonl"), str(folder / "chats.jsonl")]


@pytest.fixture
def settings(model_folder, data, tmp_path):
    """Settings of a run that takes a second: rows of 16 tokens, examples of up to 3 of them."""

    def make(**changes):
        values = {
            "model": str(model_folder),
            "data": data,
            "proportions": [0.7, 0.3],
            "output": str(tmp_path / "run"),
            "mem_layers": [1],
            "row_length": ROW,
            "last_context_length": LAST,
            "total_length": TOTAL,
            "batch_size": ROWS,
            "accumulation": 1,
            "chat_initial_prompt": "",
            "steps": 4,
            "learning_rate": 3e-3,
            "log_every": 1,
            "save_every": 2,
            "cpu": True,
            "quiet": True,
        }
        return InstructSettings(**(values | changes))

    return make


@torch.no_grad()
def token_losses(model, batch):
    """Each answer token's loss, by way of all logits."""
    hidden = model(batch["input_ids"], batch["attention_mask"], contexts=batch["contexts"]).hidden_states[0]
    logits, targets = (hidden @ model.lm_head.weight.T).flatten(0, 1), batch["shift_labels"].flatten()
    return cross_entropy(logits, targets, reduction="none")[targets != IGNORE_INDEX]


@pytest.mark.slow
def test_training_learns_and_saves_a_long_llama(settings, data):
    result = train_instruct(settings(steps=30, save_every=30, eval_data=data[:1], eval_every=15))
    output = Path(result["output"])
    history, held_out = losses(output), losses(output, "eval_loss")
    assert sum(history[-5:]) < sum(history[:5]) - 1
    assert len(held_out) == 3 and held_out[2] < held_out[0]
    assert result["losses"] == {"loss": history[-1], "eval_loss": held_out[2]}
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "longllama"
    assert (config["mem_layers"], config["max_position_embeddings"]) == ([1], ROW)
    assert config["last_context_length"] == LAST
    assert isinstance(AutoModelForCausalLM.from_pretrained(output), LongLlamaForCausalLM)
    assert len(AutoTokenizer.from_pretrained(output)) == config["vocab_size"]


def test_the_loss_is_the_mean_over_all_answers_of_all_passes(settings, model_folder, data):
    made = settings(accumulation=2, data=data[:1], proportions=[], eval_data=data[:1], eval_batches=1)
    train_instruct(made)
    model = LongLlamaForCausalLM.from_pretrained(
        model_folder, mem_layers=[1], max_position_embeddings=ROW, dtype=torch.float32
    ).eval()
    examples = load_instructions(data[0], AutoTokenizer.from_pretrained(model_folder))
    split = MemorySplit(ROW, LAST, TOTAL)

    def mean(seed, streams):
        batches = [
            next(InstructBatches([examples], [1.0], split, rows=ROWS, seed=seed, stream=number, streams=streams))
            for number in range(streams)
        ]
        assert any(any(batch["contexts"]) for batch in batches)
        return float(torch.cat([token_losses(model, batch) for batch in batches]).mean())

    assert losses(made.output)[0] == pytest.approx(mean(made.seed, 2), rel=1e-5)
    assert losses(made.output, "eval_loss")[0] == pytest.approx(mean(made.seed, 1), rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bits(settings, tmp_path):
    changes = {"steps": 12, "save_every": 2, "lora_dropout": 0.1, "lora": True, "accumulation": 2}
    changes |= {"negatives": 2, "negative_weight": [1, 9], "negative_weight_warmup": 0.5}
    train_instruct(settings(**changes, output=str(tmp_path / "whole")))
    broken = settings(**changes, output=str(tmp_path / "broken"))
    kill_behind("instruct", broken, 4)
    broken.resume = True
    train_instruct(broken)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_copies_grow_evenly_on_a_logarithmic_scale():
    class Stream:
        negative_weight_progress = 0.0

        def __next__(self):
            return {"negative_weight_progress": self.negative_weight_progress}

    batch_source = InstructBatchSource({0: Stream(), 1: Stream()}, 8)
    for step, negative_weight_progress in ((0, 0), (2, 0.25), (8, 1), (11, 1)):
        assert batch_source.micro_batches(step) == [{"negative_weight_progress": negative_weight_progress}] * 2
    assert InstructBatchSource({0: Stream()}).micro_batches(0) == [{"negative_weight_progress": 1}]
    assert [
        log_interpolate((2, 8), negative_weight_progress) for negative_weight_progress in (0, 0.5, 1)
    ] == pytest.approx([2, 4, 8])


@pytest.mark.slow
def test_two_processes_lose_as_one_with_two_passes(settings, tmp_path):
    train_instruct(settings(accumulation=2, output=str(tmp_path / "one")))
    shared = settings(output=str(tmp_path / "two"))
    finish(start("instruct", shared, *TORCHRUN))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)


def test_only_the_attention_of_memory_layers_is_trained_where_asked(settings, model_folder):
    result = train_instruct(settings(trainable="memory_layers", steps=2))
    before, after = weights(model_folder), weights(result["output"])
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}


def test_messages_need_a_chat_template(settings, tmp_path):
    file = tmp_path / "messages.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}))
    with pytest.raises(LlamoryError, match=r"messages\.jsonl:1 has messages, but the tokenizer .* no chat template"):
        train_instruct(settings(data=[str(file)], proportions=[]))


def test_a_checkpoint_of_other_settings_or_data_is_refused(settings, data):
    train_instruct(settings())
    with pytest.raises(LlamoryError, match="another split: random, not last"):
        train_instruct(settings(split="last", resume=True))
    with pytest.raises(LlamoryError, match="position in the data"):
        train_instruct(settings(data=[data[0], *[str(Path(data[1]).parent)]], resume=True))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": None}, "set steps"),
        ({"negatives": -1}, "negatives must be at least 0"),
        ({"negative_weight": [2]}, "must be two numbers above 0"),
        ({"negative_weight_warmup": 1.5}, "negative_weight_warmup must be at most 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"input_length": 0}, "input_length must be at least 1"),
        ({"proportions": [0.5, 0.4]}, "add up to 1"),
        ({"proportions": [1.0]}, "2 sources"),
        ({"last_context_length": 17}, "at most row_length"),
        ({"batch_size": 2}, "may need 3 rows, but a batch has 2"),
        ({"row_length": 4096}, "longer than the context"),
        ({"mem_layers": [2]}, "mem_layers"),
        ({"question_field": "ask"}, "nor 'ask'"),
        ({"data": ["nowhere.jsonl"], "proportions": []}, "nowhere"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, changes, sentence):
    with pytest.raises(LlamoryError, match=sentence):
        train_instruct(settings(**changes))


# ---- frozen_context --------------------------------------------------------------------------------------------------


@pytest.fixture
def frozen_context(settings, tmp_path):
    """Settings of a run on documents read frozen_context, with questions about each."""
    chance, file = random.Random(1), tmp_path / "documents.jsonl"
    words = "river stone bridge winter garden letter".split()
    with file.open("w") as out:
        for _ in range(12):
            told = {f"w{number}": chance.choice(words) for number in range(3)}
            document = " ".join(f"{key} {value}" for key, value in told.items())
            asked = [{"question": f"{key}", "response": f" {value}"} for key, value in told.items()]
            out.write(json.dumps({"document": document, "questions": asked}) + "\n")

    def make(**changes):
        values = {
            "data": [str(file)],
            "proportions": [],
            "frozen_context": True,
            "query_token_budget": 96,
            "negatives": 2,
        }
        values |= {"trainable": "memory_projections", "total_length": 60, "split": "memory", "post_question_text": ""}
        return settings(**(values | changes))

    return make


@pytest.mark.parametrize("bias", [0.0, 0.7])
def test_apart_trains_what_rows_of_one_batch_would(frozen_context, model_folder, bias):
    changes = {"steps": 25, "save_every": 25, "negative_weight": [1, 5], "context_cache_rows": 8}
    result = train_instruct(frozen_context(**changes, memory_size_bias=bias))
    assert json.loads((Path(result["output"]) / "config.json").read_text())["memory_size_bias"] == bias
    history = losses(Path(result["output"]))
    assert sum(history[-5:]) < sum(history[:5]) - 0.5
    before, after = weights(model_folder), weights(result["output"])
    own = {f"model.layers.1.self_attn.mem_{part}_proj.weight" for part in "qkvo"}
    assert after.keys() - before.keys() == own
    assert all(torch.equal(before[key], after[key]) for key in before)
    # The first step's loss, with the rows that are seen in one batch with those that see them.
    made = frozen_context()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = load_instructions(made.data, tokenizer, InstructFormat(post_question_text=""), Lengths(total=60))
    split = MemorySplit(ROW, LAST, 60, "memory")
    batch = next(
        FrozenContextBatches(
            [examples],
            [1.0],
            split,
            rows=ROWS,
            seed=made.seed,
            negatives=2,
            negative_weight=(1, 5),
            query_token_budget=96,
        )
    )
    more = {"memory_size_bias": bias, "dtype": torch.float32}
    model = LongLlamaForCausalLM.from_pretrained(
        model_folder, mem_layers=[1], max_position_embeddings=ROW, **more
    ).eval()
    losses_of: list[torch.Tensor] = []
    for row, (seen, many) in enumerate(zip(batch["contexts"], batch["context_weights"], strict=True)):
        read = [batch["context_ids"][at, : batch["context_lengths"][at]] for at in seen]
        asked = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        rows = torch.nn.utils.rnn.pad_sequence([*read, asked], batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in [*read, asked]], batch_first=True)
        contexts = [[]] * len(read) + [list(range(len(read)))]
        hidden = model(
            rows, attention_mask=mask, contexts=contexts, context_weights=[[]] * len(read) + [many]
        ).hidden_states[0][-1, : len(asked)]
        targets = batch["shift_labels"][row][: len(asked)]
        kept = targets != IGNORE_INDEX
        losses_of.append(cross_entropy(hidden[kept] @ model.lm_head.weight.T, targets[kept], reduction="none"))
    assert history[0] == pytest.approx(float(torch.cat(losses_of).detach().mean()), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_apart_resumes_to_the_same_bits_and_is_evaluated(frozen_context, tmp_path):
    changes = {"steps": 8, "save_every": 2, "lora": True, "context_cache_rows": 4, "eval_batches": 2, "eval_every": 4}
    changes["eval_data"] = frozen_context().data
    train_instruct(frozen_context(**changes, output=str(tmp_path / "whole")))
    broken = frozen_context(**changes, output=str(tmp_path / "broken"))
    kill_behind("instruct", broken, 4)
    broken.resume = True
    train_instruct(broken)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    held_out = losses(tmp_path / "whole", "eval_loss")
    assert len(held_out) == 3 and held_out[-1] != held_out[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainable": "all"}, "needs trainable: memory_projections"),
        ({"context_cache_rows": -1}, "context_cache_rows must be at least 0"),
        ({"query_token_budget": 0}, "query_token_budget must be at least 1"),
        ({"batch_size": 2}, "but a batch has 2"),
    ],
)
def test_settings_that_cannot_be_apart_are_refused(frozen_context, changes, sentence):
    with pytest.raises(LlamoryError, match=sentence):
        train_instruct(frozen_context(**changes))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("paper/instruct_*.yaml")), ids=lambda file: file.stem)
def test_recipes_can_be_read_and_give_the_published_batch(file):
    made = read_settings(InstructSettings, file, {"data": ["a.jsonl", "b.jsonl"], "output": "b"})
    split = MemorySplit(made.row_length, made.last_context_length, made.total_length, made.split)
    assert made.batch_size == 4 * split.max_rows
    assert made.accumulation == 16
