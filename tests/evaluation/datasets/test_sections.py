"""Headings and sections of documents in several formats."""

from pathlib import Path

import pytest

from llamory.evaluation.datasets.sections import plain_heading, section_pairs

BODY = "This section has enough words to say something about {}, which its heading does not say in so many words."

MARKDOWN = f"""Words before the first heading are no section that anybody asks for, however many: {"x " * 20}

# Rivers and lakes

{BODY.format("water")}

A second paragraph of it.

## 2.1 What do boats need?

{BODY.format("boats")}

## Short one

Too few words.

## One

{BODY.format("a heading of one word")}

## Said twice here

{BODY.format("one")}

## Said twice here

{BODY.format("two")}
"""

HTML = f"""<html><head><title>A page</title></head><body><h2>A.1.4 Why is there <em>rain</em>?</h2>
<p>{BODY.format("weather")}</p><h3>Sun and moon</h3><p>{BODY.format("the sky")}</p></body></html>"""

RST = f"""=============
Deep valleys
=============

{BODY.format("valleys")}

High hills
----------

{BODY.format("hills")}
"""


@pytest.fixture
def documents(tmp_path) -> Path:
    for name, text in {"a.md": MARKDOWN, "b.html": HTML, "c.rst": RST, "d.py": "# High hills\nx = 1\n" * 30}.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_heading_is_paired_with_its_section(documents) -> None:
    found = {pair.query: pair.text for pair in section_pairs([documents])}
    assert found == {
        "Rivers and lakes": BODY.format("water") + "\n\nA second paragraph of it.",
        "What do boats need?": BODY.format("boats"),
        "Why is there rain?": BODY.format("weather"),
        "Sun and moon": BODY.format("the sky"),
        "Deep valleys": BODY.format("valleys"),
        "High hills": BODY.format("hills"),
    }


@pytest.mark.parametrize(
    ("title", "plain"),
    [
        ("A.1.4 What is rain?", "What is rain?"),
        ("3. Results", "Results"),
        ("12.3.1) Further results", "Further results"),
        ("IV. The end", "The end"),
        ("§ 5 Of contracts", "Of contracts"),
        ("A river in May", "A river in May"),
        ("I am a heading", "I am a heading"),
        ("## Marks ##", "Marks"),
        ("2001 was a year", "2001 was a year"),
    ],
)
def test_numbers_before_a_heading_are_left_out(title, plain) -> None:
    assert plain_heading(title) == plain
