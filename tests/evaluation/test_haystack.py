"""A haystack is sentences around a needle, as long as wanted."""

import json

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, Haystack, read_haystack

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
def test_a_text_is_parted_at_the_sentence_end_nearest_to_the_depth(depth: float, before: str, after: str) -> None:
    assert ABC.around(4, depth) == (before, after)


def test_the_depth_is_a_share_of_the_text_not_of_its_sentences() -> None:
    uneven = Haystack(("A" * 89 + ". ", "B. ", "C. ", "D. "))
    assert uneven.around(4, 0.5) == ("A" * 89 + ".", "B. C. D.")
    assert uneven.around(4, 0.4) == ("", "A" * 89 + ". B. C. D.")


def test_a_short_text_is_repeated() -> None:
    assert ABC.around(6, 0.5) == ("Aaaa. Bbbb. Cccc.", "Dddd. Aaaa. Bbbb.")


def test_the_published_text_begins_anew_after_the_needle() -> None:
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
