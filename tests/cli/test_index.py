"""`llamory index` passes its options on and reports what it did."""

import json
import sys
from pathlib import Path

import pytest

SUMMARY = "lib: 3 added, 1 updated, 2 unchanged, 0 removed; 41 passages.\n"


def test_index_reports_what_it_did(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "a.md", "c", "--library", "lib")
    assert ran == (0, SUMMARY, "reading ...\n")
    unset = {"chunk_size": None, "text_field": "text", "max_file_size": 64.0, "strict": False, "wait": True}
    unset |= {"allow_empty": False}
    unset |= {"engine": "local", "ray_address": None}
    assert calls == [
        ("library", "lib", {"model": "default", "bf16": False, "device": None}),
        ("add", [Path("a.md"), Path("c")], unset),
    ]


def test_index_lists_what_could_not_be_read(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "a.md", "b", "--library", "lib")
    assert (ran.code, ran.out) == (0, SUMMARY + "1 could not be read:\n  b/bad .txt: no text\n")


def test_index_that_took_nothing_in_is_an_error(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "b", "--library", "lib", "--json", "--quiet")
    assert ran.code == 2
    assert json.loads(ran.out)["failed"] == [{"path": "b/bad\x1b.txt", "reason": "no text"}]
    assert ran.err == "Error: Nothing could be indexed; correct what is listed, or give other files.\n"


def test_index_hands_on_what_it_is_told(llamory, calls: list[tuple]) -> None:
    told = (
        "--model m --chunk-size 99 --text-field body --max-file-size 0.5 --strict --allow-empty --no-wait"
        " --bf16 --json --quiet --engine ray --ray-address here:6379"
    )
    ran = llamory("index", "a.md", "--library", "s3://shelf/lib", *told.split())
    assert json.loads(ran.out) == {
        "library": "s3://shelf/lib",
        "added": 3,
        "unchanged": 2,
        "updated": 1,
        "removed": 0,
        "passages": 41,
        "failed": [],
        "skipped": [],
    }
    assert ran.err == ""
    settings = {
        "chunk_size": 99,
        "text_field": "body",
        "strict": True,
        "allow_empty": True,
        "wait": False,
        "max_file_size": 0.5,
    }
    settings |= {"engine": "ray", "ray_address": "here:6379"}
    assert calls == [
        ("library", "s3://shelf/lib", {"model": "m", "bf16": True, "device": None}),
        ("add", [Path("a.md")], settings),
    ]


def test_index_takes_documents_out(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "--remove", "a.md", "--library", "lib")
    assert ran.out == "lib: 0 added, 0 updated, 0 unchanged, 2 removed; 0 passages.\n"
    assert calls[1] == ("remove", [Path("a.md")], {"wait": True})


def test_index_needs_something_to_read(llamory, calls: list[tuple]) -> None:
    assert llamory("index", "--library", "lib").code == 2


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "a.txt").write_text("a text")
    return folder


def test_ray_that_isnt_installed_is_told_with_the_remedy(llamory, tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = llamory("index", folder, "--library", tmp_path / "library", "--model", tmp_path, "--engine", "ray")
    assert ran.code == 2 and "pip install 'llamory[ray]'" in ran.err.replace("\n", " ")
    assert not (tmp_path / "library").exists()


def test_an_address_without_ray_is_of_no_use(llamory, tmp_path, folder):
    ran = llamory("index", folder, "--library", tmp_path / "l", "--model", tmp_path, "--ray-address", "here:1")
    assert ran.code == 2 and "needs the engine `ray`" in " ".join(ran.err.split())


def test_an_unknown_engine_is_refused(llamory, tmp_path, folder):
    assert llamory("index", folder, "--library", tmp_path / "l", "--engine", "steam").code == 2


def test_infinity_is_no_limit_of_the_file_size(llamory, tmp_path, folder, model_folder, calls):
    assert llamory("index", folder, "--library", "lib", "--max-file-size", "inf").code == 0
    assert calls[1][2]["max_file_size"] >= 2**40


def test_the_device_is_handed_on(llamory, folder, calls):
    assert llamory("index", folder, "--library", "lib", "--device", "cpu").code == 0
    assert llamory("search", "light", "--library", "lib", "--device", "cpu").code == 0
    assert [call[2]["device"] for call in calls if call[0] == "library"] == ["cpu", "cpu"]
