"""BEIR folders are read as BEIR's own code reads them; errors name file and line."""

import json
from pathlib import Path

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.qrels import load_beir

CORPUS = [
    {"_id": "d1", "title": "Rivers", "text": "They run south."},
    {"_id": "d2", "title": "", "text": "a stone"},
    {"_id": "d3", "text": "no title", "metadata": {"url": "x"}},
]
QUERIES = [{"_id": "q1", "text": "where do they run"}, {"_id": "q2", "text": "what"}, {"_id": "q3", "text": "unjudged"}]


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "corpus.jsonl", CORPUS)
    write(tmp_path / "queries.jsonl", QUERIES)
    judge(tmp_path, "test", "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td3\t1\n")
    return tmp_path


def write(path: Path, entries: list[dict]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def judge(folder: Path, split: str, rows: str) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / f"{split}.tsv").write_text(rows)


def test_titles_precede_texts_and_only_queries_with_qrels_are_used(folder: Path) -> None:
    data = load_beir(folder)
    assert dict(data.read()) == {"d1": "Rivers They run south.", "d2": "a stone", "d3": "no title"}
    assert list(data.read()) == list(data.read())
    assert data.ids == ["d1", "d2", "d3"]
    assert data.queries == {"q1": "where do they run", "q2": "what"}
    assert data.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d3": 1}}
    assert (data.name, data.split, data.missing_relevant) == (folder.name, "test", 0)


@pytest.mark.parametrize(
    "rows",
    [
        "q1\td1\t1\n",
        "q1\t0\td1\t1\n",
        "qid\tdocid\trel\nq1\td1\t1\n",
        "\ufeffquery-id\tcorpus-id\tscore\r\nq1\td1\t1.0",
    ],
)
def test_qrels_may_have_any_header_or_none_or_the_columns_of_trec(folder: Path, rows: str) -> None:
    judge(folder, "test", rows)
    assert load_beir(folder).qrels == {"q1": {"d1": 1}}


def test_the_split_is_chosen(folder: Path) -> None:
    judge(folder, "dev", "q2\td2\t1\n")
    assert load_beir(folder).split == "test"
    assert load_beir(folder, "dev").qrels == {"q2": {"d2": 1}}
    with pytest.raises(LlamoryError, match="there is no split 'train'; there are dev, test"):
        load_beir(folder, "train")
    (folder / "qrels" / "test.tsv").rename(folder / "qrels" / "train.tsv")
    with pytest.raises(LlamoryError, match="name a split; there are dev, train"):
        load_beir(folder)
    (folder / "qrels" / "train.tsv").unlink()
    assert load_beir(folder).split == "dev"


def test_a_folder_per_split_is_found(folder: Path) -> None:
    (folder / "set").mkdir()
    for name in ("corpus.jsonl", "queries.jsonl", "qrels"):
        (folder / name).rename(folder / "set" / name)
    (folder / "set").rename(folder / "test")
    data = load_beir(folder)
    assert (data.name, list(data.queries)) == (f"{folder.name}/test", ["q1", "q2"])


def test_a_query_that_is_a_document_is_recognized_by_id_and_text(folder: Path) -> None:
    write(
        folder / "corpus.jsonl", [*CORPUS, {"_id": "q1", "text": " where do they\nrun "}, {"_id": "q2", "text": "else"}]
    )
    assert load_beir(folder).self_documents == {"q1"}
    assert load_beir(folder, ignore_identical_ids=True).self_documents == {"q1", "q2"}
    judge(folder, "test", "q1\tq1\t1\nq2\td3\t1\n")
    assert load_beir(folder).self_documents == set()


def test_other_content_has_another_fingerprint(folder: Path) -> None:
    before = load_beir(folder).fingerprint
    assert load_beir(folder).fingerprint == before
    write(folder / "corpus.jsonl", [*CORPUS, {"_id": "d4", "text": "more"}])
    assert load_beir(folder).fingerprint != before


def test_missing_relevant_documents_are_counted(folder: Path) -> None:
    judge(folder, "test", "q1\td1\t1\nq1\tgone\t1\nq1\taway\t0\n")
    assert load_beir(folder).missing_relevant == 1


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("h\th\th\nq1 d1 1\n", r"test.tsv:2: a line should be a query's id"),
        ("h\th\th\nq1\td1\tyes\n", r"test.tsv:2: "),
        ("h\th\th\nq1\td1\t0.5\n", r"test.tsv:2: .* a whole number"),
        ("q9\td1\t1\n", r"test.tsv:1: there is no 'q9' in queries.jsonl"),
        ("q1\td1\t0\n", r"no query with a relevant document"),
        ("", r"no query with a relevant document"),
    ],
)
def test_broken_qrels_are_refused(folder: Path, rows: str, sentence: str) -> None:
    judge(folder, "test", rows)
    with pytest.raises(LlamoryError, match=sentence):
        load_beir(folder)


def test_a_broken_corpus_is_refused(folder: Path) -> None:
    write(folder / "corpus.jsonl", [*CORPUS, {"_id": "d2", "text": "again"}])
    with pytest.raises(LlamoryError, match=r"corpus.jsonl:4: the id 'd2' is repeated"):
        load_beir(folder)
    write(folder / "corpus.jsonl", [{"_id": "d1", "title": "no text"}])
    with pytest.raises(LlamoryError, match=r"corpus.jsonl:1: the object has no 'text'"):
        load_beir(folder)
    (folder / "corpus.jsonl").write_text("\n")
    with pytest.raises(LlamoryError, match="has no documents"):
        load_beir(folder)
    (folder / "corpus.jsonl").unlink()
    with pytest.raises(LlamoryError, match=r"is no BEIR folder: there is no corpus.jsonl"):
        load_beir(folder)


def test_numbers_may_be_ids(folder: Path) -> None:
    write(folder / "corpus.jsonl", [{"_id": 7, "text": "seven"}])
    judge(folder, "test", "q1\t7\t1\n")
    assert load_beir(folder).ids == ["7"]
