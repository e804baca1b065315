"""Splits depend on content only, are disjoint, and are written as BEIR folders."""

import json
import random
from pathlib import Path

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.datasets import DecontaminationIndex, Pair, split_pairs, write_set
from llamory.evaluation.qrels import load_beir


def text(seed: int, count: int = 30) -> str:
    chance = random.Random(seed)
    return " ".join("".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(count))


def pair(number: int, body: str | None = None, **changes: str) -> Pair:
    body = text(number) if body is None else body
    return Pair(**{"query": f"title {number}", "text": body, "group": body, "source": f"p{number}"} | changes)


def parts_of(pairs: list[Pair]) -> dict[str, str]:
    found = split_pairs(pairs).pairs
    return {pair.source: part for part, kept in found.items() for pair in kept}


def test_new_pairs_move_no_existing_one() -> None:
    few, more = [pair(i) for i in range(400)], [pair(i) for i in range(1600)]
    before, after = parts_of(few), parts_of(random.Random(0).sample(more, 1600))
    assert len(before) == 400 and len(after) == 1600
    assert before == {source: after[source] for source in before}
    sizes = [sum(part == wanted for part in after.values()) for wanted in ("test", "dev", "train")]
    assert sizes == pytest.approx([250, 100, 1250], abs=45)


def test_duplicates_are_removed_regardless_of_case_and_punctuation() -> None:
    pairs = [pair(i) for i in range(50)]
    duplicates = [
        pair(90, query="TITLE: 3!"),
        pair(91, text(4).upper().replace(" ", ", ")),
        pair(92, group=text(5).title()),
    ]
    found = split_pairs([*pairs, *duplicates])
    assert found.duplicates == 3
    assert sum(map(len, found.pairs.values())) == 50


def plain_overlap(one: str, other: str) -> float:
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), other.split()))
    return len(first & second) / min(len(first), len(second))


def test_splits_have_no_near_duplicates_and_test_keeps_its_pairs() -> None:
    pairs = [pair(i) for i in range(300)]
    where = parts_of(pairs)
    # Half of each text's words stand in a longer one of a group of its own, and so mostly in another part.
    twins = [pair(1000 + i, text(i)[: 7 * 24] + text(5000 + i, 10)) for i in range(300)]
    found = split_pairs([*pairs, *twins])
    kept = {entry.source: (part, entry.text) for part, entries in found.pairs.items() for entry in entries}
    for i in range(300):
        if where[f"p{i}"] == "test":
            assert kept[f"p{i}"][0] == "test"
        both = [kept[name] for name in (f"p{i}", f"p{1000 + i}") if name in kept]
        assert both
        if len(both) == 2:
            assert both[0][0] == both[1][0]
            assert plain_overlap(both[0][1], both[1][1]) >= 0.5  # the twins were alike indeed
    assert found.near_duplicates == 600 - len(kept) > 50


def test_texts_that_share_less_than_half_are_kept() -> None:
    pairs = [pair(i) for i in range(200)]
    others = [pair(1000 + i, text(i)[: 7 * 12] + text(5000 + i, 30)) for i in range(200)]
    assert plain_overlap(pairs[0].text, others[0].text) < 0.5
    assert split_pairs([*pairs, *others]).near_duplicates == 0


def test_splits_are_written_as_separate_beir_folders(tmp_path: Path) -> None:
    pairs = [pair(i) for i in range(200)]
    splits = split_pairs(pairs)
    counts = write_set(tmp_path / "set", splits, "About it.\n")
    assert sum(counts.values()) == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
    assert (tmp_path / "set" / "README.md").read_text() == "About it.\n"
    by_source = {each.query: each.text for each in pairs}
    seen: set[str] = set()
    for part, count in counts.items():
        data = load_beir(tmp_path / "set" / part, part)
        documents = dict(data.read())
        assert len(documents) == len(data.queries) == count
        for query, judged in data.qrels.items():
            ((document, score),) = judged.items()
            assert (documents[document], score) == (by_source[data.queries[query]], 1)
        assert not seen & {*documents, *data.queries}
        seen |= {*documents, *data.queries}


def test_a_used_folder_and_too_few_pairs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(LlamoryError, match="isn't an empty folder"):
        write_set(tmp_path / "used", split_pairs([pair(i) for i in range(200)]), "")
    with pytest.raises(LlamoryError, match="too few pairs"):
        write_set(tmp_path / "new", split_pairs([pair(1)]), "")
    assert not (tmp_path / "new").exists()


def test_decontamination_finds_test_data(tmp_path: Path) -> None:
    write_set(tmp_path / "set", split_pairs([pair(i) for i in range(60)]), "about")
    judged = DecontaminationIndex([tmp_path / "set" / "test"])
    for part in ("test", "train"):
        lines = (tmp_path / "set" / part / "corpus.jsonl").read_text().splitlines()
        queries = (tmp_path / "set" / part / "queries.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in [*lines, *queries]]
        # Half of a document's runs are enough, and case is none of a query's words.
        texts += [" ".join(json.loads(line)["text"].split()[:20]).upper() for line in lines]
        assert {judged.contains(text) for text in texts} == {part == "test"}
