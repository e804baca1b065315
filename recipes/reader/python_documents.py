"""Writes the long modules of this Python's standard library as documents, some of them held out.

    python recipes/reader/python_documents.py DIR        writes DIR/train/*.py and DIR/held_out/*.py

Every Python installation has these texts (Python's licence), and many are far longer than a model's context. Tests are
excluded, and every eighth module by name is held out.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

LEAST = 8_000  # characters; shorter modules fit into a context
EVERY = 8
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "idlelib",
    "encodings",
    "pydoc_data",
}


def modules(folder: Path) -> list[Path]:
    """Long modules except tests and tables, sorted by path."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        parts = set(path.relative_to(folder).parts[:-1])
        if not parts & LEFT_OUT and path.stat().st_size >= LEAST:
            found.append(path)
    return found


def main() -> None:
    """Copy the modules."""
    if len(sys.argv) != 2:
        raise SystemExit("Give an output folder.")
    stdlib, target = Path(sysconfig.get_path("stdlib")), Path(sys.argv[1])
    counts = {"train": 0, "held_out": 0}
    for number, path in enumerate(modules(stdlib)):
        part = "held_out" if number % EVERY == EVERY - 1 else "train"
        name = ".".join(path.relative_to(stdlib).parts)
        (target / part).mkdir(parents=True, exist_ok=True)
        (target / part / name).write_text(path.read_text(encoding="utf-8", errors="replace"), encoding="utf-8")
        counts[part] += 1
    sys.stdout.write(f"{counts['train']} modules to train on and {counts['held_out']} held out\n")


if __name__ == "__main__":
    main()
