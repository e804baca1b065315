"""Files are read as documents; what is broken is named or skipped."""

import logging

import pytest

from llamory.documents import read_documents
from llamory.errors import LlamoryError
from sample_documents import read


def test_an_empty_file_in_a_folder_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("Rain.")
    assert [document.source for document in read_documents(tmp_path)] == [str(tmp_path / "b.txt")]


def test_files_without_any_text_raise_at_the_end(tmp_path):
    with pytest.raises(LlamoryError, match="No text could be read"):
        read(tmp_path / "a.html", "<p><br></p>")


def test_json_lines_are_one_document_each_with_their_line(tmp_path):
    lines = '{"body": "Bees.", "title": "A"}\n\n{"body": " "}\n{"body": "Rain.", "title": null}\n'
    first, second = read(tmp_path / "a.jsonl", lines, text_field="body")
    assert (first.source, first.title, first.text) == (f"{tmp_path}/a.jsonl:1", "A", "Bees.")
    assert (second.source, second.title, second.sections[0].line) == (f"{tmp_path}/a.jsonl:4", "", 4)


BROKEN_LINES = {
    '{"text": "x"': "not valid JSON",
    "[1]": "should be a JSON object",
    '{"txt": "x"}': "no 'text'",
    '{"text": 3}': "should be a string, not int",
    '{"text": "\\ud800"}': "not valid Unicode",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.items())
def test_a_broken_json_line_is_named_with_its_number(tmp_path, line, reason):
    with pytest.raises(LlamoryError, match=rf"a\.jsonl:3: .*{reason}"):
        read(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + line + "\n")


def test_broken_lines_can_be_skipped_with_a_count(tmp_path, caplog):
    lines = ['{"text": "first"}', *BROKEN_LINES, '{"text": "last"}']
    path = tmp_path / "a.jsonl"
    with caplog.at_level(logging.WARNING):
        documents = read(path, "\n".join(lines).encode() + b'\n{"text": "\xff"}\n', skip_broken=True)
    assert [document.text for document in documents] == ["first", "last"]
    assert f"{len(BROKEN_LINES) + 1} broken lines" in caplog.text
    assert f"{path}:2" in caplog.text


def test_a_file_that_is_not_utf8_is_named_with_its_line_or_skipped(tmp_path, caplog):
    (tmp_path / "b.txt").write_text("Rain.")
    (tmp_path / "a.txt").write_bytes("Bees.\ncaf\xe9".encode("latin-1"))
    with pytest.raises(LlamoryError, match=r"a\.txt:2: the file is not UTF-8"):
        list(read_documents(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read_documents(tmp_path, skip_broken=True)] == ["Rain."]
    assert "a.txt:2" in caplog.text
