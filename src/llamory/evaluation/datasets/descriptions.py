"""The dataset of package descriptions: the query is the title of a Debian package, the text its long description."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llamory.common.io import file_digest
from llamory.errors import LlamoryError
from llamory.evaluation.datasets import Pair, words

MIN_WORDS = 10  # of a description
README = """# Package descriptions

Titles and long descriptions of Debian packages, made by `llamory dataset descriptions`. The query is a title, the
relevant text is the description of that package. Of descriptions that begin with the same paragraph, one is included.

Source:

{sources}

A description is part of its package and has its licence, which under the Debian Free Software Guidelines allows use,
modification and redistribution; see https://metadata.ftp-master.debian.org/changelogs/.
"""
_UPDATE_SUITES = ("-security", "-updates", "-backports", "-proposed")  # of a release; these change daily


@contextmanager
def downloaded_package_lists() -> Iterator[list[Path]]:
    """Descriptions of all packages of this machine's Debian release, downloaded by apt-get to a temporary folder."""
    apt = shutil.which("apt-get")
    if apt is None:
        raise LlamoryError("Package descriptions need apt-get, which isn't installed; give --package-list FILE.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt-get downloads as another user
        (folder / "lists" / "partial").mkdir(parents=True)
        command = [apt, "-o", "Acquire::Languages=en", "-o", "Acquire::GzipIndexes=false"]
        command += ["-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder / 'cache'}", "update"]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted((folder / "lists").glob("*Translation-en"))
        base_lists = [path for path in found if not any(later in path.name for later in _UPDATE_SUITES)]
        if not base_lists:
            reason = (process.stderr.strip().splitlines() or ["it gave no Translation-en file"])[-1]
            raise LlamoryError(f"apt-get couldn't download package descriptions: {reason.rstrip('.')}.")
        yield base_lists


def description_pairs(files: Iterable[Path]) -> Iterator[Pair]:
    """Title and long description of each package; those that begin with the same paragraph form a group.

    The files are Translation-en or Packages files, `apt-cache dumpavail`, or /var/lib/dpkg/status.
    """
    for path in files:
        for package, title, text in _stanzas(path):
            if len(words(text)) >= MIN_WORDS and len(words(title)) > 1:
                yield Pair(title, text, text.split("\n\n", 1)[0], package)


def format_package_lists(files: Iterable[Path]) -> str:
    """The sources for the README."""
    return "\n".join(f"- {path.name}, sha256 {file_digest(path)}{_release(path)}" for path in files)


def _release(path: Path) -> str:
    """Name, version and date of the release of a downloaded list."""
    release = path.with_name(path.name.split("_main_")[0] + "_InRelease")
    if not release.exists():
        return ""
    head = release.read_text(encoding="utf-8", errors="replace").splitlines()[:20]
    fields = dict(line.split(": ", 1) for line in head if ": " in line)
    release_fields = [fields[key] for key in ("Origin", "Codename", "Version", "Date") if key in fields]
    return f" ({', '.join(release_fields)})" if release_fields else ""


def _stanzas(path: Path) -> Iterator[tuple[str, str, str]]:
    """Package, title and long description of each stanza with a description."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LlamoryError(f"{path} is not UTF-8 text; give an uncompressed Translation-en file.") from error
    for stanza in re.split(r"\n\s*\n", text):
        parts = (field.partition(":") for field in re.split(r"\n(?![ \t])", stanza))
        fields = {name: value for name, _, value in parts}
        title, *lines = fields.get("Description-en", fields.get("Description", "")).split("\n")
        if lines:
            paragraphs = _join_paragraphs([line[1:].rstrip() for line in lines])
            yield fields.get("Package", "").strip(), title.strip(), paragraphs


def _join_paragraphs(lines: list[str]) -> str:
    """Join each paragraph into a line; lines with more indentation, such as lists, stay (Debian policy 5.6.13)."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if line.strip() == ".":
            paragraphs.append([])
        elif line[:1] in " \t" or not paragraphs[-1]:
            paragraphs[-1].append(line)
        else:
            paragraphs[-1][-1] += f" {line}"
    return "\n\n".join("\n".join(paragraph) for paragraph in paragraphs if paragraph).strip()
