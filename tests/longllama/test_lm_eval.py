"""lm-evaluation-harness runs on a LongLLaMA as on any model."""

import json

import pytest
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM

from llamory.longllama import LongLlamaForCausalLM

TASK = {
    "task": "weather",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "The river is {{weather}} today, so the boat is",
    "doc_to_choice": ["at home", "on the water", "in the garden"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture
def results(model_folder, tmp_path, monkeypatch):
    """Evaluates a model on the task; gives the accuracy and each answer's log-likelihoods."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = tmp_path / "test.jsonl"
    documents = [{"weather": word, "answer": index} for index, word in enumerate(["calm", "wild and cold" * 4, "high"])]
    data.write_text("\n".join(json.dumps(document) for document in documents))
    (tmp_path / "weather.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}})
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def evaluate(model, **settings):
        harness = HFLM(pretrained=model, tokenizer=tokenizer, **{"batch_size": 4} | settings)
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        found = lm_eval.simple_evaluate(
            harness, tasks=["weather"], task_manager=manager, log_samples=True, bootstrap_iters=0
        )
        answers = [[pair[0][0] for pair in sample["resps"]] for sample in found["samples"]["weather"]]
        return found["results"]["weather"]["acc,none"], answers

    return evaluate


def test_short_prompts_score_as_with_the_plain_model(model_folder, results):
    accuracy, answers = results(LongLlamaForCausalLM.from_pretrained(model_folder, mem_layers=[1]))
    plain_accuracy, plain_answers = results(LlamaForCausalLM.from_pretrained(model_folder))
    assert accuracy == plain_accuracy
    torch.testing.assert_close(torch.tensor(answers), torch.tensor(plain_answers), atol=0, rtol=1e-4)


def test_prompts_past_the_context(model_folder, results):
    long = LongLlamaForCausalLM.from_pretrained(model_folder, mem_layers=[1], max_position_embeddings=8)
    _, answers = results(long.eval(), batch_size=1, max_length=200)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    prompt = tokenizer(TASK["doc_to_text"].replace("{{weather}}", "wild and cold" * 4)).input_ids
    for choice, found in zip(TASK["doc_to_choice"], answers[1], strict=True):
        answer = tokenizer(" " + choice).input_ids
        assert len(prompt + answer) > 2 * 8
        # The last token has nothing to predict, so the harness leaves it out.
        scores = long(torch.tensor([prompt + answer[:-1]])).logits[0, -len(answer) :].log_softmax(-1)
        expected = [row[token].item() for row, token in zip(scores, answer, strict=True)]
        # The harness sums float32 log-probabilities in an order of its own, so the tolerance grows with the terms.
        assert found == pytest.approx(sum(expected), rel=1e-5 * len(expected))
