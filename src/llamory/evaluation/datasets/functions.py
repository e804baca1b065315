"""The dataset of Python functions: the query is a docstring's first paragraph, the text the function without it."""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from llamory.documents import scan_files
from llamory.errors import LlamoryError
from llamory.evaluation.datasets import Pair, words

MIN_WORDS, MAX_WORDS = 3, 100  # of a query
MIN_LINES, MAX_LINES = 3, 200  # of a function without its docstring
# Dependencies of llamory with many documented functions: datasets of them are equal on machines with the same versions.
DEFAULT_PACKAGES = tuple(
    "accelerate anyio click datasets dill fonttools fsspec huggingface-hub jinja2 joblib lancedb markdown-it-py "
    "matplotlib mpmath narwhals networkx numpy packaging pandas peft pillow pydantic pygments rich scikit-learn scipy "
    "sentence-transformers sympy torch transformers typer urllib3".split()
)
_EXCLUDED_FOLDERS = {
    *("test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "lib2to3", "pydoc_data"),
    *("_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "third_party"),  # of other licences
}
# Permissive licences, by their SPDX names and by those of the older classifiers.
_SPDX = re.compile(
    r"(MIT|MIT-0|MIT-CMU|BSD|BSD-[23]-Clause|0BSD|Apache|Apache-2\.0|ISC|PSF|PSF-2\.0|Python-2\.0(\.1)?|Unlicense|Zlib|"
    r"CC0-1\.0|HPND|BSL-1\.0|Apache-2\.0 WITH LLVM-exception)",
    re.IGNORECASE,
)
_CLASSIFIERS = (
    "Apache Software License, BSD License, ISC License (ISCL), MIT License, MIT No Attribution, Python Software "
    "Foundation License, The Unlicense, Historical Permission Notice and Disclaimer (HPND)"
).split(", ")
_LICENCE_TEXT = re.compile(
    r"(the )?(new |modified |simplified |2-clause |3-clause )?(mit|bsd|apache|isc|psf)( software)?([- ]?licen[sc]e)?"
    r"([ ,-]*(version )?2(\.0)?|[ -][23]-clause)?( licen[sc]e)?",
    re.IGNORECASE,
)

README = """# Python functions

Docstrings and functions, made by `llamory dataset functions`. The query is the first paragraph of a docstring, the
relevant text is the function without it.

Sources, each under its own licence:

{sources}
"""
_SIGNATURE = re.compile(r"[\w.]+ ?\(.*\)( *->.*)?")
_Function = ast.FunctionDef | ast.AsyncFunctionDef
# Where a docstring's sections begin, in the styles of Google, numpydoc and Sphinx.
_SECTION = re.compile(
    r"\s*((Args|Arguments|Parameters|Params|Attributes|Returns?|Yields?|Raises|Examples?|Notes?|Usage|Warning)\s*:?\s*$"
    r"|[-=~]{3,}\s*$|[:@](param|type|return|raise)|>>> |\.\. )"
)


@dataclass(frozen=True)
class Origin:
    """A source of functions."""

    name: str  # of the package, with its version
    licence: str  # as stated by the package
    files: Sequence[Path]
    root: Path  # the folder that module names are relative to


def standard_library() -> Origin:
    """The standard library of this Python, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if _is_included(path.relative_to(root)))
    return Origin(f"python {platform.python_version()}", "PSF-2.0", files, root)


def default_packages() -> list[Origin]:
    """The installed packages of `DEFAULT_PACKAGES`."""
    return [origin for origin in installed_packages() if origin.name.split()[0] in DEFAULT_PACKAGES]


def installed_packages(names: Sequence[str] | None = None) -> list[Origin]:
    """Installed packages with a permissive licence, or those named; a missing or not permissive name is an error."""
    found = {}
    for package in metadata.distributions():
        name = _canonical(package.metadata["Name"] or "")
        if name and name not in found and (names is None or name in map(_canonical, names)):
            found[name] = package
    missing = [name for name in names or () if _canonical(name) not in found]
    if missing:
        raise LlamoryError(f"The package {missing[0]} isn't installed; install it, or leave it out.")
    origins = []
    for name, package in sorted(found.items()):
        licence = permissive_licence(package.metadata)
        if licence is not None and (files := _package_files(package)):
            origins.append(Origin(f"{name} {package.version}", licence, files, Path(str(package.locate_file("")))))
        elif licence is None and names is not None:
            raise LlamoryError(f"The licence of the package {name} isn't known to be permissive; leave it out.")
    return origins


def origin_of_folder(folder: Path) -> Origin:
    """The Python files of a folder; raises a LlamoryError if there are none."""
    scanned = scan_files([folder], log_skipped=True).files if folder.is_dir() else []
    files = [path for path in scanned if path.suffix == ".py" and _is_included(path.relative_to(folder))]
    if not files:
        raise LlamoryError(f"{folder} is no folder with Python files.")
    return Origin(folder.resolve().name, "your own", files, folder)


def permissive_licence(package: metadata.PackageMetadata) -> str | None:
    """The licence that a package states, if it is permissive: all parts, or, without parentheses, one joined by OR."""
    expression = _field(package, "License-Expression")
    if expression:
        choices = [expression] if "(" in expression else re.split(r"\bOR\b", expression)
        return expression if any(map(_all_permissive, choices)) else None
    entries = [entry for entry in package.get_all("Classifier") or [] if entry.startswith("License ")]
    classifiers = [entry.rsplit(" :: ", 1)[1] for entry in entries if not entry.endswith(" OSI Approved")]
    if classifiers:
        return ", ".join(classifiers) if all(entry in _CLASSIFIERS for entry in classifiers) else None
    licence_text = _field(package, "License")
    return licence_text if _all_permissive(licence_text) or _LICENCE_TEXT.fullmatch(licence_text) else None


def function_pairs(origins: Iterable[Origin], on_file: Callable[[], None] = lambda: None) -> Iterator[Pair]:
    """Pairs of all documented functions and methods, except tests and special methods such as `__len__`.

    The query is the docstring's first paragraph, 3 to 100 words; the text is the source without the docstring, 3 to
    200 lines. `on_file` is called before each file.
    """
    for origin in origins:
        for path in origin.files:
            on_file()
            try:
                with tokenize.open(path) as file:
                    source = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            module = ".".join(path.relative_to(origin.root).with_suffix("").parts)
            for name, query, text in documented_functions(source):
                if MIN_WORDS <= len(words(query)) <= MAX_WORDS:
                    yield Pair(query, text, text, f"{origin.name}: {module}.{name}")


def documented_functions(source: str) -> Iterator[tuple[str, str, str]]:
    """Name, first paragraph of the docstring, and source without docstring of a module's functions and methods."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # of another Python version, or a template
    lines = [line + "\n" for line in source.split("\n")]  # str.splitlines splits at more characters than Python does
    for name, node in _functions(tree.body):
        text = _without_docstring(node, lines)
        docstring = ast.get_docstring(node)
        special = node.name.startswith("__") and node.name.endswith("__") and node.name != "__init__"
        if docstring and text is not None and not special and not node.name.startswith("test"):
            yield name, first_paragraph(docstring), text


def first_paragraph(docstring: str) -> str:
    """The first paragraph of a docstring as one line; a first line that only repeats the signature is skipped."""
    found: list[str] = []
    lines = docstring.strip().splitlines()
    if len(lines) > 1 and _SIGNATURE.fullmatch(lines[0].strip()):
        lines = "\n".join(lines[1:]).strip().splitlines()
    for line in lines:
        if not line.strip() or _SECTION.match(line):
            break
        found.append(line.strip())
    return " ".join(" ".join(found).split())


def _without_docstring(node: _Function, lines: Sequence[str]) -> str | None:
    """The source of a function; None if it has only a docstring, or is too short or too long."""
    if len(node.body) < 2:
        return None
    docstring, first = node.body[0], min([node.lineno, *(each.lineno for each in node.decorator_list)])
    header = [each for each in ast.walk(node.args) if isinstance(each, ast.expr | ast.arg)]
    header += [] if node.returns is None else [node.returns]
    header_ends = max([node.lineno, *(each.end_lineno or 0 for each in header)])
    if docstring.lineno <= header_ends or node.body[1].lineno <= (docstring.end_lineno or 0):
        return None  # on one line with code
    kept_lines = [*lines[first - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    text = textwrap.dedent("".join(kept_lines)).strip()
    return text if MIN_LINES <= sum(map(bool, map(str.strip, text.splitlines()))) <= MAX_LINES else None


def _functions(body: Iterable[ast.stmt], outer: str = "") -> Iterator[tuple[str, _Function]]:
    for node in body:
        if isinstance(node, _Function):
            yield outer + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(node.body, f"{outer}{node.name}.")
        else:
            for branch in ("body", "handlers", "orelse", "finalbody", "cases"):
                yield from _functions(getattr(node, branch, ()), outer)


def _package_files(package: metadata.Distribution) -> list[Path]:
    files = (file for file in package.files or () if file.suffix == ".py" and ".." not in file.parts)
    return sorted(Path(str(package.locate_file(file))) for file in files if _is_included(Path(file)))


def _is_included(path: Path) -> bool:
    excluded = any(part.startswith(".") or part in _EXCLUDED_FOLDERS for part in path.parts)
    return not excluded and not path.name.startswith(("test_", "conftest"))


def _field(package: metadata.PackageMetadata, name: str) -> str:
    return str((package.get_all(name) or [""])[0]).strip()


def _all_permissive(expression: str) -> bool:
    names = [name for name in re.split(r"\bAND\b|\bOR\b|[()]", expression) if name.strip()]
    return bool(names) and all(_SPDX.fullmatch(name.strip()) for name in names)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
