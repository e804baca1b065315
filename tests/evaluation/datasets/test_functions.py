"""Functions without their docstring, and the licences of packages."""

import ast
import textwrap
from email.message import Message
from importlib.metadata import metadata
from pathlib import Path

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.datasets.functions import (
    DEFAULT_PACKAGES,
    default_packages,
    documented_functions,
    first_paragraph,
    function_pairs,
    installed_packages,
    origin_of_folder,
    permissive_licence,
    standard_library,
)

MODULE = '''
import re

@cache
def measure(river, *, deep=True):  # a comment
    """Measure a river's depth
    and width.

    Longer words.
    """
    found = river.walk()  # another
    return found["""deep""" if deep else "wide"]

class Bridge:
    """A bridge."""

    async def cross(self,
                    slowly: bool = "a text"):
        r"Cross the bridge \\o/ on foot."

        def inner():
            """Not taken out."""
            return 1
        return inner()

    def __len__(self):
        """Length of a bridge."""
        length = 1
        return length

    def only_words(self):
        """There is nothing but words here."""

    def one_line(self): "Everything is on one line."; a = 1; return a

    def no_words(self):
        a = 1
        return a

if True:
    def test_it():
        """Tests are left out too."""
        a = 1
        return a
'''


def test_only_the_docstring_is_removed() -> None:
    found = {name: (query, text) for name, query, text in documented_functions(MODULE)}
    assert list(found) == ["measure", "Bridge.cross"]
    query, text = found["measure"]
    assert query == "Measure a river's depth and width."
    assert text == (
        "@cache\ndef measure(river, *, deep=True):  # a comment\n"
        '    found = river.walk()  # another\n    return found["""deep""" if deep else "wide"]'
    )
    query, text = found["Bridge.cross"]
    assert query == r"Cross the bridge \o/ on foot."
    assert text.startswith("async def cross(self,\n") and '"""Not taken out."""' in text


@pytest.mark.parametrize("newline", ["\n", "\f\n", "\u2028\n"])
def test_lines_are_counted_as_python_counts_them(newline: str) -> None:
    source = f"x = '''a{newline}b'''\n" + textwrap.dedent(MODULE)
    assert list(documented_functions(source)) == list(documented_functions(MODULE))


def test_the_standard_librarys_functions_are_the_same_code_without_their_docstring() -> None:
    folder, count = standard_library().root, 0
    for name in ("textwrap.py", "shutil.py", "argparse.py"):
        source = (folder / name).read_text()
        bodies = {}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                node.body = node.body[1:]
                bodies[ast.dump(node)] = node.name
        for _, _, text in documented_functions(source):
            (node,) = ast.parse(text).body
            assert ast.dump(node) in bodies
            count += 1
    assert count > 20


def test_a_broken_module_has_no_functions() -> None:
    assert list(documented_functions("def (")) == list(documented_functions("\0")) == []


@pytest.mark.parametrize(
    ("docstring", "words"),
    [
        ("One line.", "One line."),
        ("Two\n  lines.\n\nMore.", "Two lines."),
        ("Does it.\nArgs:\n  x: a thing", "Does it."),
        ("Does it.\n:param x: a thing", "Does it."),
        ("Does it\n>>> do()", "Does it"),
        ("A title\n-------\nwords", "A title"),
        ("Returns the value\nof x.", "Returns the value of x."),
        ("Args:\n  x: a thing", ""),
        ("mean(x, *, axis=0) -> float\n\nMean of x.\n\nMore.", "Mean of x."),
        ("mean(x) is the mean\nof x.", "mean(x) is the mean of x."),
        ("mean(x)", "mean(x)"),
    ],
)
def test_the_query_is_the_first_paragraph_of_the_docstring(docstring: str, words: str) -> None:
    assert first_paragraph(docstring) == words


def test_files_of_a_folder_are_read_without_its_tests(tmp_path: Path) -> None:
    for folder in ("tests", "_vendor"):
        (tmp_path / "rivers" / folder).mkdir(parents=True)
    (tmp_path / "rivers" / "deep.py").write_text(MODULE)
    for other in ("rivers/tests/other.py", "rivers/test_deep.py", "rivers/.hidden.py", "rivers/_vendor/x.py"):
        (tmp_path / other).write_text(MODULE)
    pairs = list(function_pairs([origin_of_folder(tmp_path)]))
    assert [pair.source for pair in pairs] == [
        f"{tmp_path.name}: rivers.deep.measure",
        f"{tmp_path.name}: rivers.deep.Bridge.cross",
    ]
    with pytest.raises(LlamoryError, match="no folder with Python files"):
        origin_of_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"License-Expression": "MIT"}, "MIT"),
        ({"License-Expression": "BSD-3-Clause AND (MIT OR Apache-2.0)"}, "BSD-3-Clause AND (MIT OR Apache-2.0)"),
        ({"License-Expression": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT"),
        ({"License-Expression": "MPL-2.0 AND MIT"}, None),
        ({"License-Expression": "MPL-2.0 AND (MIT OR ISC)"}, None),
        ({"License-Expression": "GPL-3.0-only", "License": "MIT"}, None),
        ({"Classifier": "License :: OSI Approved :: MIT License"}, "MIT License"),
        ({"Classifier": "License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License": "MIT"}, None),
        ({"Classifier": "License :: Other/Proprietary License"}, None),
        ({"License": "Apache License 2.0"}, "Apache License 2.0"),
        ({"License": "BSD 3-Clause License"}, "BSD 3-Clause License"),
        ({"License": "MIT License with the Commons Clause"}, None),
        ({"License": "AGPL-3.0"}, None),
        ({}, None),
    ],
)
def test_only_permissive_licences_are_taken(fields: dict[str, str], licence: str | None) -> None:
    package = Message()
    for name, value in fields.items():
        package[name] = value
    assert permissive_licence(package) == licence


@pytest.mark.slow
def test_default_packages_are_permissive_dependencies() -> None:
    names = [origin.name.split()[0] for origin in default_packages()]
    assert names == sorted(DEFAULT_PACKAGES)  # all of them are installed where the tests run
    assert permissive_licence(metadata("torch")) is not None


def test_installed_packages_are_found_by_name_and_licence() -> None:
    (found,) = installed_packages(["Jinja2"])
    assert found.name.startswith("jinja2 ") and any(path.name == "environment.py" for path in found.files)
    with pytest.raises(LlamoryError, match="nowhere-to-be-found isn't installed"):
        installed_packages(["nowhere-to-be-found"])
    with pytest.raises(LlamoryError, match="licence of the package hypothesis isn't"):  # MPL
        installed_packages(["hypothesis"])
