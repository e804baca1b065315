"""Plain text, its encodings and newlines, and Python."""

from llamory.documents import Section
from sample_documents import parts, read


def test_text_has_paragraphs(tmp_path):
    [document] = read(tmp_path / "notes.txt", "\n\nOne\ntwo.\n \nThree.\n")
    assert document.sections == (Section("One\ntwo.", "notes", 3), Section("Three.", "notes", 6))


def test_python_has_functions_and_methods_and_the_code_around_them(tmp_path):
    text = '''"""About bees."""

import os

@cache
def find(x):
    """Find it."""
    def inner(): pass
    return x

class Hive:
    """Their home."""
    size = 1

    # How many.
    async def count(self):
        return 1

if os:
    def late(): pass
LAST = find(1)
'''
    [document] = read(tmp_path / "bees.py", text)
    assert parts(document) == [
        ("bees", 1),
        ("bees", 3),
        ("bees.find", 5),
        ("bees.Hive", 11),
        ("bees.Hive.count", 15),
        ("bees", 19),
        ("bees.late", 20),
        ("bees", 21),
    ]
    assert document.sections[4].text == "    # How many.\n    async def count(self):\n        return 1"
    assert " ".join(section.text for section in document.sections).split() == text.split()


def test_python_that_does_not_parse_is_read_as_text(tmp_path):
    [document] = read(tmp_path / "old.py", "print 'x'\n\nprint 'y'\n")
    assert parts(document) == [("old", 1), ("old", 3)]


def test_python_may_declare_its_encoding(tmp_path):
    [document] = read(tmp_path / "a.py", "# -*- coding: latin-1 -*-\nx = 'ß'\n".encode("latin-1"))
    assert "ß" in document.text


def test_a_byte_order_mark_and_other_newlines_are_no_text(tmp_path):
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfBees.\r\nRain.")[0].text == "Bees.\nRain."
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "Bees."}')[0].text == "Bees."


def test_other_encodings_with_a_mark_are_text(tmp_path):
    for name in ("utf-16", "utf-32"):
        assert read(tmp_path / f"{name}.txt", "Bienen.\r\nRegen ☔.".encode(name))[0].text == "Bienen.\nRegen ☔."
