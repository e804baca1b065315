"""A library keeps whole documents, knows what changed, and finds passages by cosine."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from llamory.embedding import pipeline as pipeline_module
from llamory.errors import LlamoryError
from llamory.library import AddReport, Library
from llamory.library import indexer as indexer_module
from llamory.library import store as store_module


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    return Library(tmp_path / "library", model_folder)


def names(library: Library) -> set[str]:
    return {Path(hit.source).name for hit in library.search("cat", top=100)}


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


def sources(library: Library, query: str = "cat dog river money", **settings) -> list[str]:
    return [Path(hit.source).name for hit in library.search(query, **settings)]


def sections(words: str, count: int) -> str:
    return "\n\n".join(f"# Part {i}\n\n{words} and so on, number {i}" for i in range(count))


# ---- searching -------------------------------------------------------------------------------------------------------


def test_hits_are_ranked_by_cosine_best_first(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    assert add(library, docs) == AddReport(added=3, passages=3)
    hits = library.search("CAT", mode="dense")
    assert [hit.text for hit in hits[:2]] == ["the cat sat with a cat", "a cat met a dog"]
    np.testing.assert_allclose([hit.score for hit in hits], [1, 1 / math.sqrt(2), 0], atol=1e-6)
    assert len(library.search("cat", top=1)) == 1


def test_a_hit_says_where_it_stands(tmp_path, docs, model_folder):
    (docs / "guide.md").write_text("# Guide\n\nnothing of interest here\n\n## Rivers\n\na river in spring\n")
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    hit = library.search("river")[0]
    assert hit.source == str(docs / "guide.md")
    assert (hit.title, hit.line) == ("Rivers", 5)
    assert "a river in spring" in hit.text


def test_many_passages_of_different_lengths_keep_their_own_vectors(tmp_path, model_folder):
    file = tmp_path / "many.jsonl"
    texts = [f"number{i} " * (i * 7 % 50 + 1) + "cat " * i + "dog " * (100 - i) for i in range(101)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    library = Library(tmp_path / "library", model_folder)
    add(library, file)
    found = {hit.text: hit.score for hit in library.search("cat", top=101, mode="dense")}
    for i, text in enumerate(texts):
        assert found[text.strip()] == pytest.approx(i / math.hypot(i, 100 - i), abs=1e-5)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{docs}/pets", {"both.txt", "dogs.md"}),
        ("pets/", {"both.txt", "dogs.md"}),
        ("*.txt", {"cats.txt", "both.txt", "it's [new].txt"}),
        ("{docs}/*.md", {"dogs.md"}),
        ("cats.tx?", {"cats.txt"}),
        ("it's [new].txt", {"it's [new].txt"}),
        ("lines.jsonl", {"lines.jsonl:2"}),
        ("*.jsonl", {"lines.jsonl:2"}),
        ("ats.txt", set()),
        ("%", set()),
    ],
)
def test_a_search_can_be_limited_to_some_sources(tmp_path, docs, model_folder, source, expected):
    (docs / "it's [new].txt").write_text("a cat by the river")
    (docs / "lines.jsonl").write_text('\n{"text": "money for a dog"}\n')
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    assert set(sources(library, source=source.format(docs=docs))) == expected


def test_a_filter_never_costs_hits(tmp_path, model_folder):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text("cat")
    (tmp_path / "last.txt").write_text("cat dog dog")
    library = Library(tmp_path / "library", model_folder)
    add(library, tmp_path)
    assert sources(library, "cat", top=1, source="last") == ["last.txt"]


# ---- adding again ----------------------------------------------------------------------------------------------------


def test_what_is_there_already_is_not_embedded_again(tmp_path, docs, model_folder, embedded):
    add(Library(tmp_path / "library", model_folder), docs)
    assert len(embedded) == 3
    (docs / "new.txt").write_text("money")
    assert add(Library(tmp_path / "library"), docs) == AddReport(added=1, unchanged=3, passages=1)
    assert embedded[3:] == ["money"]


def test_a_changed_document_replaces_its_old_passages(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    (docs / "cats.txt").write_text("a river of money")
    assert add(library, docs) == AddReport(updated=1, unchanged=2, passages=1)
    assert len(library) == 3
    assert sources(library, "river", top=1) == ["cats.txt"]
    assert all("sat with" not in hit.text for hit in library.search("cat"))


def test_only_the_changed_passages_of_a_document_are_embedded(tmp_path, model_folder, embedded):
    page = tmp_path / "page.md"
    sections = ["# One\n\na cat walks home", "# Two\n\na dog walks home", "# Three\n\na river runs home"]
    page.write_text("\n\n".join(sections))
    library = Library(tmp_path / "library", model_folder)
    add(library, page)
    page.write_text("\n\n".join([sections[0], sections[2]]) + "\n\n# Four\n\nmoney comes home\n")
    embedded.clear()
    assert add(library, page) == AddReport(updated=1, passages=3)
    assert ["money" in text for text in embedded] == [True]
    assert len(library) == 3
    assert [(hit.title, hit.line) for hit in library.search("river", top=1)] == [("Three", 5)]


def test_a_file_deleted_from_an_indexed_folder_is_removed(tmp_path, docs, model_folder):
    elsewhere = tmp_path / "elsewhere.txt"
    elsewhere.write_text("a river")
    library = Library(tmp_path / "library", model_folder)
    add(library, docs, elsewhere)
    (docs / "cats.txt").unlink()
    elsewhere.unlink()
    assert add(library, docs) == AddReport(unchanged=2, removed=1)
    assert set(sources(library)) == {"both.txt", "dogs.md", "elsewhere.txt"}


def test_a_document_that_lost_passages_loses_them_in_the_library(tmp_path, model_folder):
    page = tmp_path / "page.md"
    page.write_text(sections("a cat", 5))
    library = Library(tmp_path / "library", model_folder)
    add(library, page)
    page.write_text(sections("a cat", 2))
    assert add(library, page) == AddReport(updated=1, passages=2)
    assert len(library) == 2


def test_a_file_that_the_folder_search_passes_over_stays_while_it_exists(tmp_path, docs, model_folder):
    hidden = docs / ".notes"
    hidden.mkdir()
    (hidden / "money.txt").write_text("money")
    library = Library(tmp_path / "library", model_folder)
    add(library, hidden / "money.txt")
    assert add(library, docs) == AddReport(added=3, passages=3)
    assert sources(library, "money", top=1) == ["money.txt"]


def test_adding_one_file_removes_nothing_else(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    assert add(library, docs / "cats.txt") == AddReport(unchanged=1)
    assert len(library) == 3


def test_a_file_that_became_empty_is_removed(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    (docs / "cats.txt").write_text("\n")
    assert add(library, docs) == AddReport(unchanged=2, removed=1)


def test_each_json_line_is_a_document(tmp_path, model_folder, embedded):
    file = tmp_path / "notes.jsonl"
    lines = [json.dumps({"text": text, "title": title}) for text, title in [("a cat", "A"), ("a dog", "B")]]
    file.write_text("\n".join(lines))
    library = Library(tmp_path / "library", model_folder)
    assert add(library, file).added == 2
    assert [(Path(hit.source).name, hit.title) for hit in library.search("dog", top=1)] == [("notes.jsonl:2", "B")]
    file.write_text(lines[1])
    embedded.clear()
    assert add(library, file) == AddReport(updated=1, removed=1, passages=1)
    assert [hit.text for hit in library.search("cat dog")] == ["a dog"]


def test_the_same_path_in_other_words_is_the_same_source(tmp_path, docs, model_folder, monkeypatch):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    monkeypatch.chdir(docs)
    assert add(library, Path()) == AddReport(unchanged=3)
    assert library.add("../docs/cats.txt", progress=False) == AddReport(unchanged=1)


def test_many_commits_are_tidied_on_the_way(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 1)
    monkeypatch.setattr(store_module, "COMMITS_PER_COMPACTION", 4)
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"cat number {i}")
    add(Library(tmp_path / "library", model_folder), folder)
    library = Library(tmp_path / "library")
    assert sorted(hit.text for hit in library.search("cat", top=20)) == [f"cat number {i}" for i in range(10)]


# ---- when a run fails ------------------------------------------------------------------------------------------------


@pytest.fixture
def stop_at(monkeypatch):
    """Makes the run stop, as Ctrl-C would, when a passage with a certain word is to be embedded."""

    def arm(word: str) -> None:
        encode_document = SentenceTransformer.encode_document

        def stopping(self, inputs, **kwargs):
            if any(word in text for text in inputs):
                raise KeyboardInterrupt
            return encode_document(self, inputs, **kwargs)

        monkeypatch.setattr(SentenceTransformer, "encode_document", stopping)

    return arm


def test_a_stopped_run_keeps_whole_documents_and_the_next_goes_on(tmp_path, model_folder, monkeypatch, stop_at):
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 4)
    folder = tmp_path / "docs"
    folder.mkdir()
    for name, word in [("a", "cat"), ("b", "dog"), ("c", "river"), ("d", "money")]:
        (folder / f"{name}.md").write_text(sections(word, 5))
    with monkeypatch.context():
        stop_at("river")
        with pytest.raises(KeyboardInterrupt):
            add(Library(tmp_path / "library", model_folder), folder)
    monkeypatch.undo()
    library = Library(tmp_path / "library")
    assert len(library) == 10
    assert set(sources(library, top=20)) == {"a.md", "b.md"}
    assert add(library, folder) == AddReport(added=2, unchanged=2, passages=10)
    assert len(library) == 20


def test_a_failed_update_leaves_the_old_passages(tmp_path, docs, model_folder, stop_at):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    (docs / "cats.txt").write_text("money, the cause of all")
    stop_at("money")
    with pytest.raises(KeyboardInterrupt):
        add(library, docs)
    assert sources(Library(tmp_path / "library"), "cat", top=1) == ["cats.txt"]


def test_a_strict_run_stops_at_a_broken_file(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    (docs / "broken.jsonl").write_text("{")
    with pytest.raises(LlamoryError, match=r"broken\.jsonl:1: the line is not valid JSON"):
        add(library, docs, strict=True)
    assert len(library) == 3


# ---- removal ---------------------------------------------------------------------------------------------------------


def test_files_and_folders_can_be_taken_out(tmp_path, docs, library):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    add(library, docs)
    assert library.remove(docs / "pets").removed == 2
    assert library.remove(f"{docs}/lines.jsonl:1").removed == 1
    assert names(library) == {"cats.txt", "lines.jsonl:2"}
    with pytest.raises(LlamoryError, match=r"nothing of .*pets"):
        library.remove(docs / "pets")
    # What was taken out isn't taken for read.
    assert add(library, docs) == AddReport(added=3, unchanged=2, passages=3)


def test_removal_needs_no_model(tmp_path, docs, library, monkeypatch):
    add(library, docs)
    monkeypatch.setattr(pipeline_module, "load_embedder", None)
    (docs / "cats.txt").unlink()
    assert Library(library.path).remove(docs / "cats.txt") == AddReport(removed=1)


# ---- folders that are empty, perhaps as their disk isn't mounted -----------------------------------------------------


def empty(folder: Path) -> None:
    for file in list(folder.rglob("*.*")):
        file.unlink()


def test_a_folder_that_lost_all_documents_is_an_error_unless_allowed(docs, library):
    add(library, docs)
    empty(docs)
    with pytest.raises(LlamoryError, match=r"docs holds no documents now, but the library has 3 .*--allow-empty"):
        add(library, docs)
    assert len(library) == 3
    assert add(library, docs, allow_empty=True) == AddReport(removed=3)


def test_a_mount_point_that_is_empty_for_a_moment_costs_no_vectors(tmp_path, docs, library, embedded):
    add(library, docs)
    docs.rename(tmp_path / "mounted")
    docs.mkdir()
    with pytest.raises(LlamoryError, match="check that its disk is mounted"):
        add(library, docs)
    docs.rmdir()
    (tmp_path / "mounted").rename(docs)
    embedded.clear()
    assert add(library, docs) == AddReport(unchanged=3)
    assert embedded == []


def test_one_empty_folder_of_several_stops_the_run_before_it_writes(tmp_path, docs, library):
    other = tmp_path / "other"
    other.mkdir()
    (other / "river.txt").write_text("a river")
    add(library, docs, other)
    (other / "river.txt").write_text("a long river")
    empty(docs)
    with pytest.raises(LlamoryError, match="docs holds no documents now"):
        add(library, other, docs)
    assert {hit.text for hit in library.search("river", source="other/")} == {"a river"}


def test_an_empty_folder_below_a_given_one_keeps_its_documents_and_is_listed(docs, library):
    add(library, docs)
    (docs / "cats.txt").write_text("a new cat")
    empty(docs / "pets")
    report = add(library, docs)
    assert (report.updated, report.removed, len(library)) == (1, 0, 3)
    (failure,) = report.failed
    assert failure.path == str(docs / "pets") and "--allow-empty" in failure.reason
    assert add(library, docs, allow_empty=True) == AddReport(unchanged=1, removed=2)


def test_a_deleted_folder_below_a_given_one_is_removed(docs, library):
    add(library, docs)
    empty(docs / "pets")
    (docs / "pets").rmdir()
    assert add(library, docs) == AddReport(unchanged=1, removed=2)


def test_a_folder_that_is_unmounted_during_the_run_keeps_its_documents(tmp_path, docs, library, monkeypatch):
    add(library, docs)
    tasks = indexer_module.Update.tasks

    def unmounting(self, *settings):
        docs.rename(tmp_path / "mounted")
        docs.mkdir()
        return tasks(self, *settings)

    monkeypatch.setattr(indexer_module.Update, "tasks", unmounting)
    report = add(library, docs)
    assert (report.removed, len(library)) == (0, 3)
    assert {failure.reason for failure in report.failed} >= {"it vanished before it was read"}


def test_a_given_path_that_is_gone_is_an_error_and_removes_nothing(docs, library):
    add(library, docs)
    empty(docs)
    for folder in (docs / "pets", docs):
        folder.rmdir()
    for path in (docs, docs / "cats.txt"):
        with pytest.raises(LlamoryError, match="no file or folder"):
            add(library, path, allow_empty=True)
    assert len(library) == 3


# ---- removal without a model -----------------------------------------------------------------------------------------


def test_a_run_without_changes_needs_no_model(docs, library, monkeypatch, model_folder):
    add(library, docs)
    monkeypatch.setattr(pipeline_module, "load_embedder", None)
    for model in (None, model_folder):
        assert add(Library(library.path, model), docs) == AddReport(unchanged=3)


def test_files_that_did_not_change_are_not_parsed_again(docs, library, monkeypatch):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    add(library, docs)
    (docs / "cats.txt").write_text("a new cat")
    read: list[str] = []
    files = sys.modules["llamory.documents"]
    read_file = files.read_file
    monkeypatch.setattr(
        files, "read_file", lambda path, **settings: read.append(path.name) or read_file(path, **settings)
    )
    assert add(library, docs) == AddReport(updated=1, unchanged=4, passages=1)
    assert read == ["cats.txt"]
    # Another field is another text of the same file.
    (docs / "lines.jsonl").write_text('{"text": "a cat", "body": "money"}\n')
    add(library, docs)
    assert add(library, docs, text_field="body").updated == 1


# ---- more than one process -------------------------------------------------------------------------------------------

HOLDER = """
import sys
from llamory.common.io import write_lock
with write_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(library):
    """Another process that writes to the library until it is told to stop."""
    command = [sys.executable, "-c", HOLDER, library.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_second_process_is_told(docs, library, holder):
    with pytest.raises(LlamoryError, match="Another process is writing"):
        add(library, docs, wait=False)


def test_a_second_process_waits(docs, library, holder, capsys):
    done: list[AddReport] = []
    thread = threading.Thread(target=lambda: done.append(library.add(docs)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not done
    holder.stdin.write("\n")
    holder.stdin.flush()
    thread.join(60)
    assert done[0].added == 3
    assert "waiting until it is done" in capsys.readouterr().err


def test_a_killed_process_holds_nothing(docs, library, holder):
    holder.kill()
    holder.wait()
    assert add(library, docs, wait=False).added == 3


def test_two_that_make_a_library_at_once_make_one(tmp_path, docs, model_folder, other_model_folder):
    first, second = (Library(tmp_path / "library", model_folder) for _ in range(2))
    third = Library(tmp_path / "library", other_model_folder)
    reports: list[AddReport] = []
    threads = [
        threading.Thread(target=lambda which=which: reports.append(add(which, docs))) for which in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((report.added, report.unchanged) for report in reports) == [(0, 3), (3, 0)]
    assert len(Library(tmp_path / "library")) == 3
    with pytest.raises(LlamoryError, match="another model"):
        add(third, docs)


def test_reading_goes_on_while_another_writes(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 2)
    monkeypatch.setattr(store_module, "COMMITS_PER_COMPACTION", 3)
    docs = tmp_path / "docs"
    docs.mkdir()

    def write(version: int) -> None:
        for i in range(12):
            parts = [f"# Part {part}\n\nThe cat of version {version} went on." for part in range(3)]
            (docs / f"{i}.md").write_text("\n\n".join(parts))

    write(0)
    writer = Library(tmp_path / "library", model_folder)
    add(writer, docs)
    reader, stop, errors, seen = Library(tmp_path / "library"), threading.Event(), [], set()

    def read() -> None:
        try:
            while not stop.is_set():
                for mode in ("dense", "bm25", "fused"):
                    by_source: dict[str, list[str]] = {}
                    for hit in reader.search("cat version", top=99, mode=mode):
                        by_source.setdefault(hit.source, []).append(hit.text.split("version ")[1])
                    # Every document is there, whole, and of one version.
                    assert len(by_source) == 12
                    assert all(len(texts) == 3 and len(set(texts)) == 1 for texts in by_source.values())
                    seen.update(text for texts in by_source.values() for text in texts)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for version in range(1, 4):
        write(version)
        assert add(writer, docs).updated == 12
    stop.set()
    thread.join()
    assert errors == []
    assert len(seen) > 1  # the open library saw what was written


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_a_library_knows_its_model_and_settings(tmp_path, docs, model_folder):
    add(Library(tmp_path / "library", model_folder), docs, chunk_size=50)
    info = Library(tmp_path / "library").info()
    assert info["model"] == str(model_folder)
    assert (info["dimension"], info["chunk_size"]) == (4, 50)
    assert (info["documents"], info["passages"]) == (3, 3)


def test_a_library_may_lie_at_a_uri(tmp_path, docs, model_folder):
    uri = f"file://{tmp_path}/library"
    add(Library(uri, model_folder), docs)
    assert sources(Library(uri), "cat", top=1) == ["cats.txt"]


def test_a_library_may_lie_in_an_object_store(docs, model_folder):
    library = Library("memory://shelf/library", model_folder)
    assert add(library, docs) == AddReport(added=3, passages=3)
    (docs / "cats.txt").write_text("money")
    assert add(library, docs) == AddReport(updated=1, unchanged=2, passages=1)
    assert library.remove(docs / "pets").removed == 2
    assert sources(library, "money") == ["cats.txt"]


def test_a_missing_library_is_not_made_by_looking(tmp_path):
    with pytest.raises(LlamoryError, match="no library"):
        Library(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_library_says_so(tmp_path, model_folder):
    library = Library(tmp_path / "library", model_folder)
    assert len(library) == 0
    for use in (lambda: library.search("cat"), library.info):
        with pytest.raises(LlamoryError, match="empty"):
            use()


def test_another_model_is_refused(tmp_path, docs, model_folder, other_model_folder):
    add(Library(tmp_path / "library", model_folder), docs)
    other = Library(tmp_path / "library", other_model_folder)
    for use in (lambda: other.search("cat"), lambda: add(other, docs)):
        with pytest.raises(LlamoryError, match="another model"):
            use()
    assert len(Library(tmp_path / "library")) == 3


def test_a_model_that_moved_is_still_the_librarys(tmp_path, docs, model_folder, embedder):
    moved = tmp_path / "moved"
    embedder.save(str(moved), create_model_card=False)
    library = Library(tmp_path / "library", moved)
    add(library, docs)
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(LlamoryError, match="no folder"):
        Library(tmp_path / "library").search("cat")
    assert sources(Library(tmp_path / "library", model_folder), "cat", top=1) == ["cats.txt"]


def test_a_loaded_model_can_be_given_and_must_be_given_again(tmp_path, docs, embedder):
    add(Library(tmp_path / "library", embedder), docs)
    assert sources(Library(tmp_path / "library", embedder), "dog", top=1) == ["dogs.md"]
    with pytest.raises(LlamoryError, match="give the model"):
        Library(tmp_path / "library").search("dog")


def test_a_library_keeps_its_passage_length(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs, chunk_size=3)
    assert len(library) > 3
    assert add(library, docs) == AddReport(unchanged=3)
    with pytest.raises(LlamoryError, match="passages of 3 tokens"):
        add(library, docs, chunk_size=4)


def test_a_blank_query_and_no_hits_at_all_are_refused(tmp_path, docs, model_folder):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    with pytest.raises(LlamoryError, match="blank"):
        library.search(" \n")
    with pytest.raises(LlamoryError, match="at least 1"):
        library.search("cat", top=0)


def test_a_folder_that_holds_some_other_table_is_not_taken_for_a_library(tmp_path):
    import lancedb

    lancedb.connect(tmp_path / "other").create_table("passages", [{"text": "a"}])
    with pytest.raises(LlamoryError, match="not a library"):
        Library(tmp_path / "other")


def test_progress_goes_to_standard_error(tmp_path, docs, model_folder, capsys, monkeypatch):
    monkeypatch.setattr("llamory.common.progress.SECONDS_BETWEEN_LINES", 0)
    Library(tmp_path / "library", model_folder).add(docs)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "3 passages embedded" in shown.err


@pytest.mark.parametrize("path", ["", " ", "\t\n", "a\0b", "caf\udce9"])
def test_a_path_that_names_nothing_is_refused_and_nothing_is_written(tmp_path, model_folder, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    for model in (None, model_folder):
        with pytest.raises(LlamoryError, match="library's path"):
            Library(path, model)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_no_store_has_is_named(model_folder):
    with pytest.raises(LlamoryError, match="nothing://here is no address of a library"):
        Library("nothing://here", model_folder)


@pytest.mark.parametrize("size", [0, -1, -math.inf, math.nan])
def test_a_largest_file_size_that_is_no_size_is_refused(docs, library, size):
    with pytest.raises(LlamoryError, match="more than 0 MiB"):
        add(library, docs, max_file_size=size)


def test_a_file_size_without_limit(docs, library):
    assert add(library, docs, max_file_size=math.inf).added == 3


def test_odd_arguments_of_add_are_named(docs, library):
    with pytest.raises(LlamoryError, match="at least 1 token, not 0"):
        add(library, docs, chunk_size=0)
    with pytest.raises(LlamoryError, match="text field is not valid Unicode"):
        add(library, docs, text_field="\udcff")


def test_passages_and_queries_are_embedded_in_the_same_precision(tmp_path, docs, model_folder, monkeypatch):
    dtypes: list[bool] = []
    for name in ("encode_document", "encode_query"):
        encode = getattr(SentenceTransformer, name)
        monkeypatch.setattr(
            SentenceTransformer,
            name,
            lambda self, inputs, encode=encode, **settings: (
                dtypes.append(torch.is_autocast_enabled("cpu")) or encode(self, inputs, **settings)
            ),
        )
    for bf16 in (False, True):
        library = Library(tmp_path / str(bf16), model_folder, device="cpu", bf16=bf16)
        add(library, docs)
        library.search("cat")
    assert dtypes == [False] * 2 + [True] * 2


def test_importing_the_library_loads_no_torch():
    program = (
        "import sys, llamory.library; print([m for m in ('torch', 'transformers', 'lancedb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
