"""`llamory dataset` builds sets that `llamory eval retrieval` reads."""

import json
from pathlib import Path

import pytest

WORDS = "amber basin cedar delta ember fjord grove harbour island jungle kelp lagoon meadow north ocean prairie".split()


@pytest.fixture
def packages(tmp_path) -> Path:
    """A list of two hundred packages."""
    stanzas = []
    for number in range(200):
        three = [WORDS[(number // 16**place) % 16] for place in range(3)]
        text = " ".join(f"{word}{number}{place}" for place in range(5) for word in three)
        stanzas.append(f"Package: p{number}\nDescription-en: {' '.join(three)} {number}\n {text}\n")
    file = tmp_path / "mirror_Translation-en"
    file.write_text("\n".join(stanzas))
    return file


@pytest.fixture
def modules(tmp_path) -> Path:
    """A folder with a module of two hundred documented functions."""
    folder = tmp_path / "code"
    folder.mkdir()
    functions = []
    for number in range(200):
        lines = "\n".join(f"    value{number} = step{place}_{number}(value{number})" for place in range(5))
        functions.append(
            f'def f{number}(value{number}):\n    """Compute the number {number} step by step."""\n{lines}\n'
        )
    (folder / "steps.py").write_text("\n\n".join(functions))
    return folder


def test_descriptions_become_a_set_that_is_evaluated(llamory, packages, tmp_path) -> None:
    ran = llamory("dataset", "descriptions", "--package-list", packages, "--output", tmp_path / "set", "--json")
    assert ran.code == 0, ran.err
    counts = json.loads(ran.out)["pairs"]
    assert sum(counts.values()) == 200 and set(counts) == {"train", "dev", "test"}
    assert "mirror_Translation-en, sha256 " in (tmp_path / "set" / "README.md").read_text()
    for part in ("test", "dev"):
        scored = llamory("eval", "retrieval", tmp_path / "set", "--split", part, "--json", "--quiet")
        document = json.loads(scored.out)
        assert document["settings"]["data"] == f"set/{part}"
        assert document["settings"]["queries"] == document["settings"]["documents"] == counts[part]
    again = llamory("dataset", "descriptions", "--package-list", packages, "--output", tmp_path / "set")
    assert (again.code, again.out) == (2, "")
    assert "isn't an empty folder" in again.err


def test_functions_become_a_set(llamory, modules, tmp_path) -> None:
    ran = llamory("dataset", "functions", "--folder", modules, "--output", tmp_path / "set")
    assert ran.code == 0, ran.err
    counts = [
        len((tmp_path / "set" / part / "corpus.jsonl").read_text().splitlines()) for part in ("test", "dev", "train")
    ]
    assert ran.out == (
        f"{tmp_path / 'set'}: {counts[0]} test, {counts[1]} dev, {counts[2]} train pairs; "
        "0 duplicates and 0 near duplicates were removed.\n"
    )
    entry = json.loads((tmp_path / "set" / "train" / "corpus.jsonl").read_text().splitlines()[0])
    number = entry["metadata"]["source"].removeprefix("code: steps.f")
    assert entry["text"].startswith(f"def f{number}(value{number}):\n    value{number} = step0_{number}")
    assert "Compute" not in entry["text"]
    assert "- code: your own" in (tmp_path / "set" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["descriptions", "--package-list", "nowhere"], "There is no file nowhere."),
        (["functions", "--folder", "nowhere"], "nowhere is no folder with Python files."),
        (["functions", "--package", "nowhere-to-be-found"], "The package nowhere-to-be-found isn't installed"),
        (
            ["functions", "--package", "rich", "--folder", "."],
            "--package can't be given with --folder; give one of them.",
        ),
    ],
)
def test_a_wrong_wish_is_one_sentence(llamory, tmp_path, arguments: list[str], sentence: str) -> None:
    ran = llamory("dataset", *arguments, "--output", tmp_path / "set")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("Error: " + sentence)
    assert not (tmp_path / "set").exists()


def test_sections_become_a_set_to_judge_with(llamory, tmp_path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    for i in range(40):
        body = " ".join(f"word{i}x{j}" for j in range(30))
        (folder / f"{i}.md").write_text(f"# Heading number{i} alpha\n\n{body}\n")
    ran = llamory("dataset", "sections", folder, "--test-only", "--output", tmp_path / "set", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["pairs"] == {"test": 40}
    assert [path.name for path in (tmp_path / "set").iterdir() if path.is_dir()] == ["test"]
    scored = llamory("eval", "retrieval", tmp_path / "set", "--json", "--quiet")
    assert json.loads(scored.out)["runs"]["BM25"]["nDCG@10"] >= 0
