"""Optional dependencies: the core works without them, and everything else names the command that installs them."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from llamory.common.extras import EXTRAS, explain_import_error, import_extra, require
from llamory.errors import LlamoryError

ROOT = Path(__file__).parents[2]
OPTIONAL = sorted({name for names in EXTRAS.values() for name in names} - {"accelerate", "scipy"})
# Runs the command line in an interpreter that does not find the optional packages.
BLOCKED = f"""
import importlib.machinery, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context):
        return iter(()) if context.name in {OPTIONAL} else super().find_distributions(context)

sys.meta_path = [Finder if each is importlib.machinery.PathFinder else each for each in sys.meta_path]
from llamory.cli import main
main(sys.argv[1:])
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_module_is_one_sentence_with_the_command(extra, monkeypatch):
    name = EXTRAS[extra][0]
    require(extra)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(LlamoryError, match=rf"needs the package {name}, .* pip install 'llamory\[\w+\]'"):
        require(extra)
    with pytest.raises(LlamoryError, match=rf"needs the package {name}, .* pip install 'llamory\[\w+\]'"):
        import_extra(f"{name}.anything")


def test_errors_of_other_modules_are_left_alone():
    assert explain_import_error(ImportError("no such thing", name="somebody.elses")) is None
    with pytest.raises(ImportError):
        import_extra("llamory.nothing")


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert set(EXTRAS) | {"all", "dev"} == set(extras)
    imports = {"pytrec-eval-terrier": "pytrec_eval"}
    for extra, modules in EXTRAS.items():
        packages = [entry.partition(">")[0] for entry in extras[extra]]
        assert {imports.get(package, package) for package in packages} == set(modules)
        assert not set(packages) & {entry.partition(">")[0] for entry in project["dependencies"]}


@pytest.mark.slow
def test_the_core_runs_without_the_extras(tmp_path, model_folder):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "note.txt").write_text("The lighthouse keeper is Nora Lindqvist. She lives in the tower.")
    commands = [
        ("index", tmp_path / "docs", "--library", tmp_path / "library", "--quiet"),
        ("search", "Who keeps the lighthouse?", "--library", tmp_path / "library"),
        ("ask", "Who keeps the lighthouse?", "--library", tmp_path / "library", "--max-new-tokens", 2, "--quiet"),
        ("read", tmp_path / "docs", "--memory", tmp_path / "memory.safetensors", "--quiet"),
        ("ask", "Who keeps the lighthouse?", "--memory", tmp_path / "memory.safetensors", "--max-new-tokens", 2),
    ]
    for command in commands:
        done = run(*command)
        assert done.returncode == 0, (command, done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (("train", "llara", "--data", "docs", "--output", "out"), "train"),
        (("train", "instruct", "--data", "docs", "--output", "out"), "train"),
    ],
)
def test_other_commands_name_the_extra(command, extra):
    done = run(*command)
    assert done.returncode == 2
    assert f"pip install 'llamory[{extra}]'" in done.stderr and done.stderr.count("\n") == 1
