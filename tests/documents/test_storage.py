"""Bytes become text: encodings and newlines."""

from sample_documents import read


def test_python_may_declare_its_encoding(tmp_path):
    [document] = read(tmp_path / "a.py", "# -*- coding: latin-1 -*-\nx = 'ß'\n".encode("latin-1"))
    assert "ß" in document.text


def test_a_byte_order_mark_and_other_newlines_are_no_text(tmp_path):
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfBees.\r\nRain.")[0].text == "Bees.\nRain."
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "Bees."}')[0].text == "Bees."


def test_other_encodings_with_a_mark_are_text(tmp_path):
    for name in ("utf-16", "utf-32"):
        assert read(tmp_path / f"{name}.txt", "Bienen.\r\nRegen ☔.".encode(name))[0].text == "Bienen.\nRegen ☔."
