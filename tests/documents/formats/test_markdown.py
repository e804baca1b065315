"""Markdown and reStructuredText."""

from sample_documents import parts, read


def test_markdown_has_its_sections_but_no_headings_inside_code(tmp_path):
    text = "Intro.\n\n# The *Guide*\n\nHello.\n\n```sh\n# no heading\n```\n\nSecond\n------\nDeep `x`.\n\n> # Quoted\n"
    [document] = read(tmp_path / "a.md", text)
    assert document.title == "The Guide"
    assert parts(document) == [("The Guide", 1), ("The Guide", 3), ("Second", 11)]
    assert document.sections[2].text == "Second\n------\nDeep `x`.\n\n> # Quoted"
    assert document.text == text


def test_markdown_front_matter_is_no_heading(tmp_path):
    [document] = read(tmp_path / "a.md", "---\ntitle: x\n---\n# Real\nText.\n")
    assert parts(document) == [("Real", 1), ("Real", 4)]


def test_rst_has_its_sections_with_and_without_overline(tmp_path):
    text = "=====\nGuide\n=====\n\nHello.\n\nPart\n----\n\nA table::\n\n    ab\n    --\n\n----\n\nEnd.\n"
    [document] = read(tmp_path / "a.rst", text)
    assert document.title == "Guide"
    assert parts(document) == [("Guide", 1), ("Part", 7)]
