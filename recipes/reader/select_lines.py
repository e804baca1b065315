"""Copies part of a file's lines.

python select_lines.py INPUT OUTPUT START STOP      START and STOP are fractions of the lines
"""

import sys
from pathlib import Path


def main() -> None:
    """Copy the lines."""
    source, target, start, stop = sys.argv[1:]
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    selected = lines[round(float(start) * len(lines)) : round(float(stop) * len(lines))]
    Path(target).write_text("".join(selected), encoding="utf-8")


if __name__ == "__main__":
    main()
