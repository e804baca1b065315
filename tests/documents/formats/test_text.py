"""Plain text and Python."""

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
