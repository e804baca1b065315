"""The passkey prompt, its length and depth, and the comparison of answers."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import KINDS, Haystack, Needle, build_prompt, draw_secret, longest_secret, score_answer
from llamory.evaluation.passkey import PasskeyResult, run_passkey

# Written by hand from the published task: five lines, the needle between two runs of the same sentences.
PUBLISHED = """\
There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. \
I will quiz you about the important information there.
The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green.
The pass key is 40123. Remember it. 40123 is the pass key.
The grass is green. The sky is blue.
What is the pass key? The pass key is"""


def length_of(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_the_default_prompt_is_the_published_one(tokenizer) -> None:
    length = length_of(tokenizer, PUBLISHED)
    prompt = build_prompt(tokenizer, length, 0.75, "40123")
    assert prompt.text == PUBLISHED
    assert prompt.input_ids == tokenizer(PUBLISHED)["input_ids"]
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert (prompt.key, prompt.sentences) == ("40123", 8)
    # With one token less a whole sentence goes.
    assert build_prompt(tokenizer, length - 1, 0.75, "40123").sentences == 7


def test_the_needle_is_first_at_depth_0_and_last_at_depth_1(tokenizer) -> None:
    first, last = (build_prompt(tokenizer, 400, depth, "7").text.split("\n") for depth in (0, 1))
    assert first[1] == last[3] == ""
    assert first[2] == last[2] == "The pass key is 7. Remember it. 7 is the pass key."
    assert first[3] == last[1]
    assert first[3].startswith("The grass is green. The sky is blue.")


words = st.text("abcdefghij", min_size=1, max_size=12)
sentences = st.lists(words, min_size=1, max_size=9).map(lambda parts: " ".join(parts).capitalize() + ". ")


@settings(deadline=None, max_examples=60)
@given(
    hay=st.builds(Haystack, st.lists(sentences, min_size=1, max_size=12).map(tuple), st.booleans()),
    length=st.integers(200, 3000),
    depth=st.floats(0, 1),
)
def test_a_prompt_fits_and_one_more_sentence_would_not(tokenizer, hay: Haystack, length: int, depth: float) -> None:
    prompt = build_prompt(tokenizer, length, depth, "31", haystack=hay)
    assert length_of(tokenizer, prompt.text) == len(prompt.input_ids) <= length
    lines = prompt.text.split("\n")
    before, after = hay.around(prompt.sentences + 1, depth)
    longer = "\n".join([lines[0], before, lines[2], after, lines[4]])
    assert length_of(tokenizer, longer) > length


@pytest.mark.parametrize("depth", [0.1, 0.25, 0.5, 0.9])
def test_the_needle_is_at_its_depth(tokenizer, depth: float) -> None:
    prompt = build_prompt(tokenizer, 4000, depth, "123")
    before, after = len(prompt.text.split("\n")[1]), len(prompt.text.split("\n")[3])
    assert before / (before + after) == pytest.approx(depth, abs=0.01)


def test_a_closing_token_is_left_out(tokenizer) -> None:
    import copy

    from tokenizers import processors

    closing = copy.deepcopy(tokenizer)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert closing("x")["input_ids"][-1] == closing.eos_token_id
    open_end = build_prompt(tokenizer, 400, 0.5, "5")
    assert build_prompt(closing, 400, 0.5, "5").input_ids == open_end.input_ids


def test_a_length_that_even_an_empty_prompt_passes_is_refused(tokenizer) -> None:
    shortest = PUBLISHED.split("\n")
    shortest[1] = shortest[3] = ""
    fits = length_of(tokenizer, "\n".join(shortest))
    assert build_prompt(tokenizer, fits, 0.5, "40123").sentences == 0
    with pytest.raises(LlamoryError, match=rf"^A prompt of {fits - 1} tokens is too short.* have {fits};"):
        build_prompt(tokenizer, fits - 1, 0.5, "40123")


@pytest.mark.parametrize("depth", [-0.1, 1.1, float("nan")])
def test_a_depth_outside_the_text_is_refused(tokenizer, depth: float) -> None:
    with pytest.raises(LlamoryError, match="outside 0 to 1"):
        build_prompt(tokenizer, 500, depth, "1")


# ---- needles ---------------------------------------------------------------------------------------------------------


def test_a_custom_needle_has_its_first_words_as_question(tokenizer) -> None:
    needle = Needle("In {Rome} the best room is {key}, I say; go to {key}.")
    lines = build_prompt(tokenizer, 300, 0.5, "12", needle=needle).text.split("\n")
    assert lines[2] == "In {Rome} the best room is 12, I say; go to 12."
    assert lines[-1] == "In {Rome} the best room is"


def test_a_custom_question_ends_the_prompt(tokenizer) -> None:
    needle = Needle("{key} is the room.", "Which room is it? It is room ")
    assert build_prompt(tokenizer, 300, 0.5, "12", needle=needle).text.endswith("\nWhich room is it? It is room")


@pytest.mark.parametrize(
    ("text", "question", "sentence"),
    [
        ("The best room is the last.", None, "has no {key}"),
        ("{key} is the room.", None, "give a question"),
        ("The room is {key}.", "Is the room {key}?", "the answer itself"),
        ("The room is {key}.", " ", "is empty"),
    ],
)
def test_a_needle_that_cannot_be_asked_for_is_refused(text: str, question: str | None, sentence: str) -> None:
    with pytest.raises(LlamoryError, match=sentence):
        Needle(text, question)


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "correct", "digits"),
    [
        (" 40123. Remember it.", True, 1.0),
        ("40123", True, 1.0),
        ("\nIt is the number 40123, twice 40123", True, 1.0),
        (" 401234", False, 1.0),
        (" 4012", False, 0.8),
        (" 40723", False, 0.8),
        (" 99999 or 40123", False, 0.0),
        (" 0123", False, 0.0),
        (" the grass", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_the_first_number_of_an_answer_must_be_the_whole_key(answer: str, correct: bool, digits: float) -> None:
    assert score_answer(answer, "40123") == (correct, digits)


@pytest.mark.parametrize(
    ("answer", "correct", "words"),
    [
        (' "the TIRED clerk hid two boats". More', True, 1.0),
        ("The tired clerk, hid two boats", True, 1.0),
        ("The tired clerk sold two boats.", False, 5 / 6),
        ("The tired clerk hid two boatsmen", False, 5 / 6),
        ("the clerk hid two boats", False, 1 / 6),
        ("", False, 0.0),
    ],
)
def test_the_first_words_of_an_answer_must_be_the_text(answer: str, correct: bool, words: float) -> None:
    assert score_answer(answer, "The tired clerk hid two boats.", "sentence") == (correct, pytest.approx(words))


@pytest.mark.parametrize("kind", KINDS)
def test_secrets_of_all_kinds_are_hidden_and_found(kind: str, tokenizer, oracle) -> None:
    needle = Needle.of(kind)
    pattern = re.escape(needle.text).replace(re.escape("{key}"), "(.+?)", 1).partition(re.escape("{key}"))[0]
    model = oracle(sees=500, says=" {}", pattern=pattern)
    result = run_passkey(model, tokenizer, [450], [0, 1], trials=3, needle=needle)
    assert result.accuracy == 1
    keys = [trial.key for cell in result.cells for trial in cell.trials]
    assert len(set(keys)) == 6
    assert all(score_answer(key, key, kind) == (True, 1) and len(key) <= len(longest_secret(kind)) for key in keys)
    assert run_passkey(oracle(sees=20), tokenizer, [450], [0], needle=needle).accuracy == 0
    drawn = {draw_secret(kind, random.Random(i)) for i in range(300)}
    assert len(drawn) > 200


def test_a_custom_needle_may_hide_a_name(tokenizer) -> None:
    needle = Needle.of("name", "The best cook is {key}.")
    assert needle.question_text == "The best cook is"
    with pytest.raises(LlamoryError, match=r"write \{key\} where the secret name goes"):
        Needle.of("name", "The best cook.")
    with pytest.raises(LlamoryError, match="must be one of number, name, date, sentence, not 'colour'"):
        Needle.of("colour")


# ---- running ---------------------------------------------------------------------------------------------------------


def test_what_a_model_can_see_is_what_it_finds(tokenizer, oracle) -> None:
    result = run_passkey(oracle(sees=500), tokenizer, [1500, 400], [0, 0.5, 1], trials=2)
    # Of 1500 tokens the last 500 are the last third: only depth 1 is in it.
    found = {(cell.length, cell.depth): cell.accuracy for cell in result.cells}
    assert found == {(400, 0): 1, (400, 0.5): 1, (400, 1): 1, (1500, 0): 0, (1500, 0.5): 0, (1500, 1): 1}
    assert (result.lengths, result.depths, result.accuracy) == ([400, 1500], [0, 0.5, 1], 4 / 6)
    for cell in result.cells:
        assert len(cell.trials) == 2
        assert cell.length - 20 < cell.tokens <= cell.length
        assert cell.seconds >= 0
        assert (cell.digits == 1) == (cell.accuracy == 1)


def test_an_answer_in_words_has_room_for_them(tokenizer, oracle) -> None:
    needle = Needle("Room {key} it is. Remember it.", "Which room is it?")
    model = oracle(sees=999, says=" It is {}.")
    assert run_passkey(model, tokenizer, [400], [0.5], needle=needle).accuracy == 1


def test_decoding_is_greedy_with_further_arguments(tokenizer, oracle) -> None:
    model = oracle(sees=10)
    run_passkey(model, tokenizer, [300], [0], trials=1, generate={"last_context_length": 77})
    (options,) = model.options
    assert options.pop("max_new_tokens") >= 5
    assert options == {"do_sample": False, "last_context_length": 77}


def test_prompts_depend_on_seed_place_and_trial_alone(tokenizer, oracle) -> None:
    def prompts(lengths, depths, **changes):
        model = oracle(sees=10)
        run_passkey(model, tokenizer, lengths, depths, **changes)
        return model.prompts

    random.seed(1)
    grid = prompts([300, 400], [0, 1], trials=2)
    random.seed(2)
    assert prompts([400, 300], [1, 0, 1], trials=2) == grid
    assert prompts([400], [1], trials=2) == grid[6:]
    assert prompts([300], [0], trials=1) == grid[:1]
    assert len({tuple(prompt) for prompt in grid}) == 8
    assert prompts([300], [0], trials=2, seed=1) != grid[:2]


def test_keys_are_between_1_and_49999(tokenizer, oracle) -> None:
    result = run_passkey(oracle(sees=999), tokenizer, [250], [0.5], trials=60)
    keys = [int(trial.key) for trial in result.cells[0].trials]
    assert all(1 <= key <= 49999 for key in keys)
    assert min(keys) < 10_000 and max(keys) > 40_000


def test_existing_cells_are_not_run_again(tokenizer, oracle) -> None:
    model, result, told = oracle(sees=999), PasskeyResult(), []
    run_passkey(model, tokenizer, [300], [0, 1], trials=2, result=result)
    before = list(result.cells)
    again = run_passkey(model, tokenizer, [300, 400], [0], trials=2, result=result, on_cell=told.append)
    assert again is result
    assert len(model.prompts) == 6
    assert [(cell.length, cell.depth) for cell in told] == [(400, 0)]
    assert [cell for cell in result.cells if cell.length == 300] == before


@pytest.mark.parametrize("nothing", [{"lengths": []}, {"depths": []}, {"trials": 0}])
def test_nothing_to_run_is_refused(tokenizer, oracle, nothing: dict) -> None:
    with pytest.raises(LlamoryError, match="nothing to run"):
        run_passkey(oracle(9), tokenizer, **({"lengths": [300], "depths": [0.5]} | nothing))


def test_progress_is_shown_on_standard_error_only_with_a_title(tokenizer, oracle, capsys) -> None:
    run_passkey(oracle(sees=999), tokenizer, [1200], [0.25], trials=1)
    assert capsys.readouterr() == ("", "")
    run_passkey(oracle(sees=9999), tokenizer, [1200], [0.25, 0.5], trials=1, title="Plain")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0].startswith("Plain 1/2: 1,200 tokens, depth 25%: found 100% (")


def test_a_real_model_answers(model_folder) -> None:
    from llamory.models.base import load_model, load_tokenizer

    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    result = run_passkey(model, tokenizer, [600], [0.5], trials=1)
    (trial,) = result.cells[0].trials
    # Random weights find nothing, but they say something.
    assert not trial.correct
    assert trial.answer
