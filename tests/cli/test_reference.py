"""docs/reference is up to date with the code that it is generated from."""

import runpy
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    pages: dict[str, str] = runpy.run_path(str(REFERENCE / "generate.py"))["pages"]()
    return pages


@pytest.mark.parametrize("file", ["cli.md", "settings.md"])
def test_a_page_is_up_to_date(pages: dict[str, str], file: str) -> None:
    committed = (REFERENCE / file).read_text(encoding="utf-8")
    assert committed == pages[file], "Run python docs/reference/generate.py."


def test_no_help_is_cut_off(pages: dict[str, str]) -> None:
    assert not [line for line in pages["cli.md"].splitlines() if "…" in line]
