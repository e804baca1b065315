"""Many-shot prompts, and answers compared with a direct computation."""

import json
import statistics
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.evaluation.manyshot import (
    Example,
    ManyshotPrompt,
    PromptTemplate,
    Trial,
    build_manyshot_prompts,
    label_scores,
    label_set,
    manyshot_curve,
    read_examples,
    run_manyshot,
)
from plain_longllama import logits, sight
from tiny_models import CONTEXT, make_long_llama

EXAMPLES = [Example(f"The sky {number} is blue.", "north" if number % 3 else "south") for number in range(60)]


@pytest.fixture(scope="module")
def model():
    return make_long_llama()


@pytest.fixture(scope="module")
def prompt_template(tokenizer) -> PromptTemplate:
    return PromptTemplate(tokenizer)


def ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected_score(model, shown: list[int], question: list[int], label: list[int]) -> float:
    """Mean log-probability of a label's tokens, from one forward over windows of demonstrations and the question."""
    row = torch.tensor([*shown, *question, *label])
    seen = sight(len(row), 0, CONTEXT, len(question) + len(label))
    told = logits(model, row, seen, model.config.mem_layers).log_softmax(-1)
    first = len(row) - len(label)
    return statistics.fmean(float(told[place - 1, row[place]]) for place in range(first, len(row)))


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [0, 5, 16, 53])
def test_labels_get_the_mean_log_probability_of_their_tokens(model, shown) -> None:
    before, question = ids(shown, 1), ids(7, 2)
    labels = [[9], [10, 11, 12, 13], [14, 15], [9, 20], [14, 15, 16]]
    memory = model.read(before) if shown else None
    found = label_scores(model, memory, question, labels)
    wanted = [expected_score(model, before, question, label) for label in labels]
    assert found == pytest.approx(wanted, abs=2e-5)
    sums = [score * len(label) for score, label in zip(wanted, labels, strict=True)]
    assert label_scores(model, memory, question, labels, "sum") == pytest.approx(sums, abs=5e-5)
    if memory is not None:
        assert memory.length(1) == shown
        assert label_scores(model, memory, question, labels) == found  # questions leave nothing behind
    assert label_scores(model, memory, question, [[9], [14]]) == pytest.approx(
        [expected_score(model, before, question, label) for label in ([9], [14])], abs=2e-5
    )


class Letters:
    """A tokenizer of single letters, by their place in the alphabet, with a token 1 before every text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict:
        found = [3 + "abcdefghijklmnopqrstuvwxyz \n".index(letter) for letter in text]
        return {"input_ids": [1, *found] if add_special_tokens else found}


@pytest.mark.parametrize("score_type", ["mean", "sum"])
@pytest.mark.parametrize("length", [0, 30])
def test_the_answer_is_the_likeliest_label(model, length, score_type) -> None:
    prompt_template = PromptTemplate(Letters())
    train = [Example(f"a{letter}", "yes" if letter in "cde" else "no") for letter in "bcdefghijkl"]
    prompts = build_manyshot_prompts(prompt_template, train, [length], [0, 1], questions=5)
    labels = ["maybe", "no", "yes"]
    trials = run_manyshot(model, prompt_template, prompts, labels, score_type=score_type)
    assert [(trial.length, trial.seed) for trial in trials] == [(length, 0), (length, 1)]
    for trial, prompt in zip(trials, prompts, strict=True):
        answers = []
        for example in prompt.questions:
            question = prompt_template.question(example.text)
            if not length:
                question = [1, *question]
            scores = [
                expected_score(model, list(prompt.input_ids), question, prompt_template.label(label))
                for label in labels
            ]
            if score_type == "sum":
                scores = [score * len(label) for score, label in zip(scores, labels, strict=True)]
            answers.append(labels[scores.index(max(scores))])
        assert trial.answers == answers
        right = [example.label for example in prompt.questions]
        assert trial.labels == right
        assert trial.accuracy == sum(a == b for a, b in zip(answers, right, strict=True)) / 5
        assert (trial.demonstrations, trial.tokens) == (prompt.demonstrations, len(prompt.input_ids))


def test_earlier_trials_are_not_run_again(model) -> None:
    prompt_template = PromptTemplate(Letters())
    prompts = [ManyshotPrompt(length, 0, tuple(ids(length)), 1, (Example("ab", "no"),)) for length in (5, 9)]
    known, told = [Trial(5, 0, 1, 5, 0.25, ["no"], ["no"], 0.1)], []
    trials = run_manyshot(model, prompt_template, prompts, ["no", "yes"], trials=known, on_trial=told.append)
    assert trials is known
    assert [trial.length for trial in trials] == [5, 9]
    assert told == trials[1:]


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_as_many_demonstrations_as_fit(tokenizer, prompt_template) -> None:
    (prompt,) = build_manyshot_prompts(prompt_template, EXAMPLES, [200], [3], questions=10)
    text = tokenizer.decode(prompt.input_ids)
    assert text.startswith("<s>The sky ")
    shown = [Example(*part.split("\n")) for part in text.removeprefix("<s>").removesuffix("\n\n").split("\n\n")]
    assert len(shown) == len(set(shown)) == prompt.demonstrations
    assert {*shown, *prompt.questions} <= set(EXAMPLES)
    assert not {*shown} & {*prompt.questions}
    assert len(prompt.questions) == 10
    longest = max(len(prompt_template.demonstration(example)) for example in EXAMPLES)
    assert 200 - longest < len(prompt.input_ids) <= 200


@given(st.lists(st.integers(40, 400), min_size=2, max_size=4, unique=True), st.integers(0, 5))
def test_longer_prompts_begin_with_shorter_ones_and_ask_the_same(lengths, seed) -> None:
    prompt_template = PromptTemplate(Letters())
    train = [Example(letter * 4 + other, "yes") for letter in "abcdefgh" for other in "abcdefgh"]
    prompts = build_manyshot_prompts(prompt_template, train, lengths, [seed], questions=4)
    assert [prompt.length for prompt in prompts] == sorted(lengths)
    for short, long in pairwise(prompts):
        assert long.input_ids[: len(short.input_ids)] == short.input_ids
        assert long.questions == short.questions
        assert len(short.input_ids) <= short.length < len(short.input_ids) + 11  # a demonstration has 11 letters


def test_a_test_file_is_asked_and_nothing_else(prompt_template) -> None:
    test = [Example(f"Is it {number}?", "north") for number in range(8)]
    few, all_of_them = (
        build_manyshot_prompts(prompt_template, EXAMPLES, [100], [0, 1], test=test, questions=count)
        for count in (3, 50)
    )
    assert [len(prompt.questions) for prompt in few] == [3, 3]
    assert all(set(prompt.questions) <= set(test) for prompt in few)
    assert all(sorted(prompt.questions, key=str) == sorted(test, key=str) for prompt in all_of_them)
    assert few[0].questions != few[1].questions
    assert few[0].input_ids != few[1].input_ids


def test_demonstrations_are_drawn_anew_for_every_seed_and_again_for_the_same(prompt_template) -> None:
    first, second = build_manyshot_prompts(prompt_template, EXAMPLES, [150], [0, 1], questions=10)
    assert first.input_ids != second.input_ids
    assert build_manyshot_prompts(prompt_template, EXAMPLES, [150], [1], questions=10) == [second]


def test_a_template_formats_demonstrations_and_questions(tokenizer) -> None:
    prompt_template = PromptTemplate(tokenizer, "Question: {text}\nType: {label}\n")
    example = Example("Who?", "human")
    assert tokenizer.decode(prompt_template.demonstration(example)) == "Question: Who?\nType: human\n"
    # The space belongs to the label's tokens, where tokenizers expect it.
    assert tokenizer.decode(prompt_template.question("Who?")) == "Question: Who?\nType:"
    assert tokenizer.decode(prompt_template.label("human")) == " human"
    assert [*prompt_template.question("Who?"), *prompt_template.label("human")] == prompt_template.demonstration(
        example
    )[:-1]


@pytest.mark.parametrize("template", ["{text}", "{label}\n{text}", "{text}{text}{label}", "{text}\n{label} {label}"])
def test_a_template_without_text_and_label_is_refused(tokenizer, template) -> None:
    with pytest.raises(LlamoryError, match=r"doesn't have \{text\} once and after it \{label\} once"):
        PromptTemplate(tokenizer, template)


def test_impossible_lengths_and_counts_are_refused(prompt_template) -> None:
    with pytest.raises(LlamoryError, match="A length of 3 tokens is too small for one demonstration, which has"):
        build_manyshot_prompts(prompt_template, EXAMPLES, [3], [0], questions=10)
    whole = 1 + sum(len(prompt_template.demonstration(example)) for example in EXAMPLES)
    with pytest.raises(LlamoryError, match=rf"All 60 demonstrations have {whole:,} tokens, less than {whole + 1:,}"):
        build_manyshot_prompts(prompt_template, EXAMPLES, [whole + 1], [0], test=EXAMPLES[:1])
    (prompt,) = build_manyshot_prompts(prompt_template, EXAMPLES, [whole], [0], test=EXAMPLES[:1])
    assert prompt.demonstrations == 60
    with pytest.raises(LlamoryError, match="The 60 examples are too few to ask 60 of them"):
        build_manyshot_prompts(prompt_template, EXAMPLES, [100], [0], questions=60)
    with pytest.raises(LlamoryError, match="A length of -1 tokens isn't possible"):
        build_manyshot_prompts(prompt_template, EXAMPLES, [-1], [0], questions=10)


# ---- examples --------------------------------------------------------------------------------------------------------


def write_lines(path, *lines: object):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_fields_can_be_named_and_numbers_are_labels(tmp_path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"question": " Who? ", "kind": 3}, "", {"question": "Why?", "kind": "x"})
    examples = read_examples(path, text_field="question", label_field="kind")
    assert examples == [Example("Who?", "3"), Example("Why?", "x")]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ({"text": "a"}, "the object has no 'label' (it has 'text')"),
        ({"label": "a"}, "the object has no 'text' (it has 'label')"),
        ({"text": "a", "label": None}, "'label' should be a text that isn't empty, not None"),
        ({"text": "a", "label": True}, "'label' should be a text that isn't empty, not True"),
        ({"text": " ", "label": "a"}, "'text' should be a text that isn't empty, not ' '"),
        ("{", "the line is not valid JSON"),
    ],
)
def test_an_incomplete_line_is_reported_with_its_number(tmp_path, line, fault) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "b", "label": "c"}, line)
    with pytest.raises(LlamoryError) as error:
        read_examples(path)
    assert f"{path}:2: {fault}" in str(error.value)


def test_files_without_examples_and_single_labels_are_refused(tmp_path) -> None:
    with pytest.raises(LlamoryError, match="There is no file"):
        read_examples(tmp_path / "gone.jsonl")
    with pytest.raises(LlamoryError, match="has no examples"):
        read_examples(write_lines(tmp_path / "a.jsonl"))
    with pytest.raises(LlamoryError, match="only the label 'x'; classification needs at least 2"):
        label_set([Example("a", "x")], None)
    assert label_set([Example("a", "x")], [Example("b", "w")]) == ["w", "x"]


# ---- curves ----------------------------------------------------------------------------------------------------------


def test_a_curve_has_means_over_seeds() -> None:
    def trial(length: int, seed: int, accuracy: float) -> Trial:
        return Trial(length, seed, 10 + seed, length - seed, accuracy, [], [], 0.1)

    trials = [trial(200, 0, 0.5), trial(200, 1, 0.7), trial(100, 0, 0.25), trial(100, 1, 0.25), trial(300, 0, 1.0)]
    short, long = manyshot_curve(trials)
    assert (short.length, short.accuracy, short.deviation) == (100, 0.25, 0.0)
    assert (long.length, long.seeds, long.demonstrations, long.tokens) == (200, 2, 10.5, 199.5)
    assert long.accuracy == pytest.approx(0.6)
    assert long.deviation == pytest.approx((2 * 0.1**2) ** 0.5)  # squares summed, divided by 2 - 1
    (only,) = manyshot_curve(trials[:1])
    assert only.deviation is None
