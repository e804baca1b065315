"""Titles and long descriptions in Debian package lists."""

import subprocess
from pathlib import Path

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.datasets.descriptions import description_pairs, downloaded_package_lists, format_package_lists

TRANSLATION = """\
Package: river-tools
Description-md5: 0123
Description-en: tools that measure rivers
 River tools measure how deep and how wide a river is,
 and write it down in a table.
 .
 They know
  * small rivers
  * large rivers
 and nothing else.

Package: river-tools-dev
Description-md5: 4567
Description-en: tools that measure rivers (headers)
 River tools measure how deep and how wide a river is,
 and write it down in a table.
 .
 This package has the headers.

Package: dummy
Description-en: transitional package
 This can be removed.
"""

STATUS = """\
Package: bridge
Status: install ok installed
Depends: libc6,
 libstone
Description: draws bridges of stone
 A program that draws bridges, of stone and of other things that bridges
 are made of.
Homepage: https://example.org
 Not part of it: one two three four five six seven eight nine ten eleven
"""


def test_paragraphs_are_joined_and_lists_kept(tmp_path: Path) -> None:
    file = tmp_path / "x_Translation-en"
    file.write_text(TRANSLATION)
    tools, headers = description_pairs([file])
    assert (tools.source, tools.query) == ("river-tools", "tools that measure rivers")
    first = "River tools measure how deep and how wide a river is, and write it down in a table."
    assert tools.text == f"{first}\n\nThey know\n * small rivers\n * large rivers and nothing else."
    assert tools.group == headers.group == first
    assert headers.text == f"{first}\n\nThis package has the headers."


def test_the_systems_own_list_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "status"
    file.write_text(STATUS.rstrip())
    (pair,) = description_pairs([file])
    assert pair.query == "draws bridges of stone"
    assert pair.text == "A program that draws bridges, of stone and of other things that bridges are made of."


def test_packed_lists_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "x_Translation-en.xz"
    file.write_bytes(b"\xfd7zXZ\x00\x80")
    with pytest.raises(LlamoryError, match="is not UTF-8 text; give an uncompressed"):
        list(description_pairs([file]))


def apt_get(folder: Path, script: str) -> Path:
    """A stand-in for apt-get."""
    command = folder / "apt-get"
    command.write_text(
        f'#!/bin/sh\nfor each; do case "$each" in Dir::State::Lists=*) lists="${{each#*=}}";; esac; done\n{script}'
    )
    command.chmod(0o755)
    return command


def test_lists_are_downloaded_to_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = "printf 'Origin: Debian\\nCodename: forky\\n\\n' > $lists/mirror_dists_forky_InRelease\n"
    lists = "for each in forky forky-security; do cp %s $lists/mirror_dists_${each}_main_i18n_Translation-en; done\n"
    (tmp_path / "list").write_text(TRANSLATION)
    apt_get(tmp_path, release + lists % (tmp_path / "list"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with downloaded_package_lists() as files:
        (file,) = files
        assert file.name == "mirror_dists_forky_main_i18n_Translation-en"
        assert len(list(description_pairs(files))) == 2
        checksum = subprocess.run(["sha256sum", file], capture_output=True, text=True, check=True).stdout.split()[0]
        assert format_package_lists(files) == f"- {file.name}, sha256 {checksum} (Debian, forky)"
    assert not file.exists()


def test_a_failure_of_apt_get_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt_get(tmp_path, "echo 'E: The network is gone.' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(LlamoryError, match=r"descriptions: E: The network is gone\.$"), downloaded_package_lists():
        pass
    (tmp_path / "apt-get").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with (
        pytest.raises(LlamoryError, match="which isn't installed; give --package-list FILE"),
        downloaded_package_lists(),
    ):
        pass
