"""Haystacks, secrets and prompts."""

from __future__ import annotations

import json

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import (
    PUBLISHED_HAYSTACK,
    TASK,
    Haystack,
    IndependentDocumentPrompts,
    Needle,
    encode,
    read_haystack,
)
from llamory.evaluation.passkey import run_passkey
from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

ABC = Haystack(("Aaaa. ", "Bbbb. ", "Cccc. ", "Dddd. "))


@pytest.mark.parametrize(
    ("depth", "before", "after"),
    [
        (0, "", "Aaaa. Bbbb. Cccc. Dddd."),
        (0.25, "Aaaa.", "Bbbb. Cccc. Dddd."),
        (0.55, "Aaaa. Bbbb.", "Cccc. Dddd."),
        (0.7, "Aaaa. Bbbb. Cccc.", "Dddd."),
        (1, "Aaaa. Bbbb. Cccc. Dddd.", ""),
    ],
)
def test_a_text_is_split_at_the_sentence_end_nearest_to_the_depth(depth: float, before: str, after: str) -> None:
    assert ABC.around(4, depth) == (before, after)


def test_depth_is_a_fraction_of_characters_not_of_sentences() -> None:
    uneven = Haystack(("A" * 89 + ". ", "B. ", "C. ", "D. "))
    assert uneven.around(4, 0.5) == ("A" * 89 + ".", "B. C. D.")
    assert uneven.around(4, 0.4) == ("", "A" * 89 + ". B. C. D.")


def test_a_short_text_is_repeated() -> None:
    assert ABC.around(6, 0.5) == ("Aaaa. Bbbb. Cccc.", "Dddd. Aaaa. Bbbb.")


def test_the_published_text_restarts_after_the_needle() -> None:
    assert PUBLISHED_HAYSTACK.around(7, 0.45) == (
        "The grass is green. The sky is blue. The sun is yellow.",
        "The grass is green. The sky is blue. The sun is yellow. Here we go.",
    )


def test_a_file_is_cut_at_sentence_ends(tmp_path) -> None:
    file = tmp_path / "walk.txt"
    file.write_text('\n\nHe went home. Then\nhe slept! "Why?" she asked.\n\nNo answer came.\n')
    sentences = read_haystack([file], 1000).sentences
    assert sentences == ("He went home. ", "Then\nhe slept! ", '"Why?" she asked.\n\n', "No answer came.\n\n")


def test_code_is_cut_at_line_ends(tmp_path) -> None:
    file = tmp_path / "walk.py"
    file.write_text("def walk():\n    return 'Home. Now.'\n\n\nwalk()\n")
    lines = read_haystack([file], 1000).sentences
    assert lines == ("def walk():\n", "    return 'Home. Now.'\n\n\n", "walk()\n\n")


def test_several_files_follow_each_other_as_far_as_they_are_needed(tmp_path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.md"
    one.write_text("".join(json.dumps({"text": f"Line {i} speaks."}) + "\n" for i in range(40)))
    two.write_text("# Two\n\nThe second file.\n")
    everything = read_haystack([one, two], 10_000).sentences
    assert everything[0] == "Line 0 speaks.\n\n"
    assert everything[-1] == "The second file.\n\n"
    # A token of more than 32 characters is unheard of, so ten tokens are surely filled by these.
    some = read_haystack([one, two], 10).sentences
    assert some == everything[: len(some)]
    assert 320 <= sum(map(len, some)) < 400


@pytest.mark.parametrize(("name", "content"), [("blank.txt", " \n\n"), ("none.jsonl", '{"text": " "}\n')])
def test_a_file_without_text_is_refused(tmp_path, name: str, content: str) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(LlamoryError, match=r"empty|No text"):
        read_haystack([file], 1000)


# ---- prompts in memory -----------------------------------------------------------------------------------------------
WINDOW = 160
TEXT = Haystack(tuple(f"On day {number} they walked {3 * number} miles further. " for number in range(90)))


@pytest.fixture(scope="module")
def model(tokenizer) -> LongLlamaForCausalLM:
    torch.manual_seed(0)
    config = LongLlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        last_context_length=32,
        mem_layers=[0, 1],
        mem_dtype="float32",
    )
    return LongLlamaForCausalLM(config).eval()


def attached_memory(model, options):
    """The memory that a question gets."""
    cache = options["past_key_values"]
    cache.prepare(1, model.new_memory)
    return cache.memory[0]


def read_windows(monkeypatch, model) -> list[list[int]]:
    """What the model is given to read from now on."""
    given: list[list[int]] = []
    read = LongLlamaForCausalLM.read

    def watched(self, ids, *args, **kwargs):
        given.append(list(ids))
        return read(self, ids, *args, **kwargs)

    monkeypatch.setattr(LongLlamaForCausalLM, "read", watched)
    return given


@pytest.mark.parametrize("hay", [TEXT, PUBLISHED_HAYSTACK])
@pytest.mark.parametrize("depth", [0, 0.3, 1])
def test_memory_holds_the_text_with_the_needle_in_one_window(tokenizer, model, monkeypatch, hay, depth) -> None:
    given = read_windows(monkeypatch, model)
    prompts = IndependentDocumentPrompts(model, tokenizer, haystack=hay)
    prompt, options = prompts(900, depth, "4711")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in given]
    assert texts[0].startswith(TASK)
    (needle,) = [text for text in texts if "4711" in text]
    assert needle == texts[-1]  # the last to be read, when all others stood
    assert "\nThe pass key is 4711. Remember it. 4711 is the pass key.\n" in needle + "\n"
    assert max(map(len, given)) <= WINDOW
    memory = attached_memory(model, options)
    assert memory.segments[-1] == "needle"
    total = memory.length() + len(prompt.input_ids)
    assert 900 - WINDOW < total <= 900
    assert prompt.in_memory == memory.length()
    assert prompt.input_ids == encode(tokenizer, prompt.text) and prompt.text.endswith("The pass key is")
    # All windows but the needle's are as they are without it: same sentences, in order.
    kept = [text for at, text in enumerate(texts[:-1]) if str(at) in memory.segments]
    whole = "".join(kept)
    assert all(text in needle or text in whole for text in (hay.sentences[0].strip(), hay.sentences[1].strip()))
    at = next(number for number in range(99) if str(number) not in memory.segments)
    assert at == {0: 0, 1: len(memory.segments) - 1}.get(depth, at)
    if depth == 0.3:
        assert 0 < at < len(memory.segments) - 1


def test_keys_and_values_are_those_of_independent_windows(tokenizer, model, monkeypatch) -> None:
    given = read_windows(monkeypatch, model)
    prompts = IndependentDocumentPrompts(model, tokenizer)
    _, options = prompts(1200, 0.6, "31")
    memory = attached_memory(model, options)
    # The published text comes round again, so fewer windows are read than are mounted.
    assert len(given) <= len(memory.segments)
    windows = {ids: model.read(ids) for ids in set(map(tuple, given))}
    for layer in (0, 1):
        for segment in memory.segments:
            keys, values = memory.keys(layer, segment), memory.values(layer, segment)
            assert any(
                keys.shape == alone.keys(layer).shape
                and torch.equal(keys, alone.keys(layer))
                and torch.equal(values, alone.values(layer))
                for alone in windows.values()
            )


def test_longer_prompts_encode_more_and_shorter_ones_attach_less(tokenizer, model, monkeypatch) -> None:
    prompts = IndependentDocumentPrompts(model, tokenizer, haystack=TEXT)
    first, _ = prompts(900, 0.5, "1")
    given = read_windows(monkeypatch, model)
    again, _ = prompts(900, 0.5, "1")
    assert again == first
    assert len(given) == 1
    prompts(600, 0.2, "2")
    assert len(given) == 2
    prompts(1500, 0.2, "2")
    assert len(given) > 4


def test_a_task_is_run_on_them(tokenizer, model) -> None:
    needle = Needle.of("name")
    prompts = IndependentDocumentPrompts(model, tokenizer, needle=needle, haystack=TEXT)
    result = run_passkey(model, tokenizer, [700, 500], [0, 1], trials=1, needle=needle, prompts=prompts)
    assert [(cell.length, cell.depth) for cell in result.cells] == [(500, 0), (500, 1), (700, 0), (700, 1)]
    assert all(cell.length - WINDOW < cell.tokens <= cell.length for cell in result.cells)
    assert all(trial.answer for cell in result.cells for trial in cell.trials)


def test_what_does_not_fit_is_refused(tokenizer, model) -> None:
    with pytest.raises(LlamoryError, match=r"^A prompt of 60 tokens is too short: a window, needle and question have"):
        IndependentDocumentPrompts(model, tokenizer)(60, 0.5, "1")
    with pytest.raises(LlamoryError, match="outside 0 to 1"):
        IndependentDocumentPrompts(model, tokenizer)(900, 2, "1")
    with pytest.raises(LlamoryError, match=f"don't fit into a window of {WINDOW} tokens"):
        IndependentDocumentPrompts(model, tokenizer, needle=Needle("word " * 90 + "{key}"))


def test_evidence_ratio_selects_the_likeliest_windows(tokenizer, model, monkeypatch) -> None:
    def likelihoods(_, question, memory, units):
        assert question == encode(tokenizer, Needle().question_text)
        return torch.tensor([-3.0 if unit[0].segment == "needle" else -30.0 for unit in units])

    monkeypatch.setattr("llamory.qa.evidence.question_likelihoods", likelihoods)
    prompt, options = IndependentDocumentPrompts(model, tokenizer, haystack=TEXT, evidence_ratio=100)(900, 0.5, "12345")
    whole, everything = IndependentDocumentPrompts(model, tokenizer, haystack=TEXT)(900, 0.5, "12345")
    assert attached_memory(model, options).segments == ("needle",)
    window = attached_memory(model, everything)
    assert torch.equal(attached_memory(model, options).keys(1), window.keys(1, "needle"))
    assert prompt.in_memory == whole.in_memory == window.length()
