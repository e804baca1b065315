"""`llamory index --engine`: what can't be done is told in a sentence before anything is made."""

import sys

import pytest


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
    assert ran.code == 2 and "only with the engine `ray`" in " ".join(ran.err.split())


def test_an_unknown_engine_is_refused(llamory, tmp_path, folder):
    assert llamory("index", folder, "--library", tmp_path / "l", "--engine", "steam").code == 2
