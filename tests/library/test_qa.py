"""A library is asked: documents are found, their memories mounted and cited, and never used once they are stale."""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llamory.errors import LlamoryError
from llamory.ingest.documents import StoredDocument
from llamory.library import Library
from llamory.library.reader import Reader
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank, SegmentSpan
from llamory.memory.search import page_index
from llamory.qa.attribution import BASELINE_FACTOR
from plain_longllama import logits, mounted_sight

READING = {"mem_layers": [0, 1], "context_length": 16, "mem_dtype": "float32"}
QUESTION = "the cat"


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "docs"
    (folder / "pets").mkdir(parents=True)
    (folder / "cats.md").write_text("# Cats\n\nthe cat sat with a cat\n\n# More\n\na cat ran home with the cat\n")
    (folder / "pets" / "dogs.md").write_text("# Dogs\n\nthe dog ran home\n\n# Bones\n\na dog met a dog with the dog\n")
    (folder / "money.txt").write_text("money the money\n")
    return folder


@pytest.fixture
def make_library(tmp_path, files, model_folder, reader_folder):
    """Makes the library, and opens it anew each time."""
    made = Library(tmp_path / "lib", model_folder)
    made.add(files, progress=False)

    def open_library(**settings) -> Library:
        return Library(tmp_path / "lib", **{"reader": reader_folder} | READING | settings)

    return open_library


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Collects the names of documents that are read."""
    names: list[str] = []
    original_read = Reader.read

    def spy(self, documents, advance):
        documents = list(documents)
        names.extend(Path(document.source).name for document in documents)
        return original_read(self, documents, advance)

    monkeypatch.setattr(Reader, "read", spy)
    return names


def ask(library: Library, question: str = QUESTION, **settings):
    return library.ask(question, **{"max_new_tokens": 6} | settings)


def names(sources) -> list[str]:
    return [Path(source).name for source in sources]


def memories(library: Library) -> list[Path]:
    return sorted((Path(library.path) / "memory").glob("*.safetensors"))


# ---- asking ----------------------------------------------------------------------------------------------------------


def test_the_documents_that_fit_are_mounted_and_no_others(make_library) -> None:
    library = make_library()
    assert names(ask(library, top_documents=1).documents) == ["cats.md"]
    assert names(ask(library, "a dog", top_documents=1).documents) == ["dogs.md"]
    assert set(names(ask(library, "dog and cat", top_documents=2).documents)) == {"cats.md", "dogs.md"}
    assert names(ask(library, "dog", source="*.txt").documents) == ["money.txt"]


def test_more_passages_are_looked_at_until_there_are_enough_documents(tmp_path, model_folder, reader_folder) -> None:
    many = "\n\n".join(f"# Part {i}\n\nthe cat and so on, number {i}" for i in range(40))
    (tmp_path / "many.md").write_text(many)
    (tmp_path / "few.md").write_text("# Few\n\na cat met a dog and money in a river")
    library = Library(tmp_path / "lib", model_folder, reader=reader_folder, **READING)
    library.add([tmp_path / "many.md", tmp_path / "few.md"], progress=False)
    assert names(library.qa_source().find("cat", 2)) == ["many.md", "few.md"]


def test_five_lines_are_enough(make_library) -> None:
    library = make_library()
    answer = library.ask(QUESTION, max_new_tokens=6)
    assert answer.text == answer.answer
    assert [(citation.location, citation.share) for citation in answer.citations]
    assert answer.tokens_read > 0
    assert ask(library).tokens_read == 0
    assert 0 < answer.seconds_to_attach < answer.seconds_to_first_token <= answer.seconds
    assert 0 < answer.seconds_to_find < answer.seconds_to_first_token


def test_the_answer_is_what_the_model_says_with_that_memory(make_library, reader_folder) -> None:
    answer = ask(make_library(), documents=["money.txt", "cats.md"])
    model, tokenizer = load_long_model(reader_folder, **READING), AutoTokenizer.from_pretrained(reader_folder)
    memory = model.new_memory()
    texts = ["money\n\nmoney the money", "# Cats\n\nthe cat sat with a cat\n\n# More\n\na cat ran home with the cat"]
    texts[0] = "money the money"  # its first line has the title
    for text in texts:
        model.read(tokenizer(text)["input_ids"], memory, segment=text)
    prompt = tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt")["input_ids"]
    found = model.generate(prompt, past_key_values=model.memory_cache(memory), max_new_tokens=6, do_sample=False)
    assert answer.text == tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert names(answer.documents) == ["money.txt", "cats.md"]


def test_text_comes_while_it_is_made(make_library) -> None:
    pieces: list[str] = []
    answer = ask(make_library(), on_text=pieces.append)
    assert "".join(pieces).strip() == answer.text


# ---- mounting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.15), ("int8", 0.15)])
@pytest.mark.parametrize("order", [["cats.md", "dogs.md", "money.txt"], ["money.txt", "cats.md", "dogs.md"]])
def test_mounting_equals_a_dense_softmax_over_documents_read_alone(make_library, order, dtype, tolerance) -> None:
    library = make_library(mem_dtype=dtype)
    source = library.qa_source()
    sources = source.resolve_documents(order)
    for name in sources:
        source.load([name])  # each is computed apart
    loaded = source.load(sources)
    assert loaded.tokens_read == 0
    model, asked = source.reader.model, torch.tensor([[5, 40, 77, 123, 9]])
    ids = [source.reader.tokenize(document).ids for document in source.documents(sources)]
    with torch.no_grad():
        found = model(asked, past_key_values=model.memory_cache(loaded.memory)).logits[0]
    seen = mounted_sight([len(each) for each in ids], asked.shape[1], READING["context_length"])
    plain = logits(model, torch.cat([*ids, asked[0]]).long(), seen, READING["mem_layers"])[-asked.shape[1] :]
    assert float((found.double() - plain).abs().max()) < tolerance * (1 if dtype == "float32" else float(plain.std()))


def test_the_order_of_documents_makes_no_difference(make_library) -> None:
    library, asked = make_library(), torch.tensor([[5, 40, 77]])
    source = library.qa_source()
    model, found = source.reader.model, []
    for order in (["cats", "dogs", "money"], ["dogs", "money", "cats"]):
        loaded = source.load(source.resolve_documents(order))
        with torch.no_grad():
            found.append(model(asked, past_key_values=model.memory_cache(loaded.memory)).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_short_documents_read_together_are_as_if_read_alone(make_library, reader_folder) -> None:
    library = make_library(context_length=64)
    library.precompute_memory(progress=False)
    source = library.qa_source()
    model = load_long_model(reader_folder, **READING | {"context_length": 64})
    for document in source.documents(library.sources()):
        alone, kept = (
            model.read(source.reader.tokenize(document).ids),
            source.reader.cached_memory(source.reader.key(document)),
        )
        assert kept is not None
        for layer in (0, 1):
            torch.testing.assert_close(kept.keys(layer), alone.keys(layer), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(kept.values(layer), alone.values(layer), atol=1e-5, rtol=1e-5)


def test_documents_of_the_same_text_share_one_memory(make_library, files, model_folder) -> None:
    (files / "copy.md").write_text((files / "cats.md").read_text())
    library = make_library()
    library.add(files, progress=False)
    answer = ask(library, documents=["cats.md", "copy.md"])
    assert names(answer.documents) == ["cats.md"]
    assert len(memories(library)) == 1


# ---- citations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", [0, 5])
def test_citations_are_the_dense_attention_of_question_and_answer(make_library, monkeypatch, left_out) -> None:
    if left_out:  # tokens of the first document

        def selected(_, question, memory, names, evidence_ratio):
            return [SegmentSpan(name, left_out * (not i), memory.length(segment=name)) for i, name in enumerate(names)]

        monkeypatch.setattr("llamory.qa.generation.select_evidence", selected)
    library = make_library(context_length=64)
    chat = library.chat(documents=["cats.md", "dogs.md"], citations=9)
    answer = chat.ask(QUESTION, max_new_tokens=6)
    source = library.qa_source()
    generator, model = source.reader.generator, source.reader.model
    documents = source.documents(source.resolve_documents(["cats.md", "dogs.md"]))
    tokenized_documents = [source.reader.tokenize(document) for document in documents]
    prompt, baseline_tokens = generator.prompt(QUESTION).ids, generator.prompt(QUESTION).baseline_tokens
    assert generator.tokenizer.decode(prompt[:baseline_tokens]).startswith("Question:")
    # The whole of it as one dense softmax: documents, question and answer.
    columns = [*prompt, *chat._ids[len(prompt) :]]
    ids = torch.cat([*(tokenized.ids.long() for tokenized in tokenized_documents), torch.tensor(columns)])
    dense: dict[int, torch.Tensor] = {}
    lengths = [len(tokenized.ids) for tokenized in tokenized_documents]
    seen = mounted_sight(lengths, len(columns), 64)
    seen.memory[sum(lengths) :, :left_out] = False
    logits(model, ids, seen, READING["mem_layers"], attention=dense)
    first = sum(lengths)
    attention_mass, baseline_corrected_mass = (
        torch.zeros(first, dtype=torch.float64),
        torch.zeros(first, dtype=torch.float64),
    )
    for probabilities in dense.values():
        to_memory = probabilities[:, first:-1, :first]
        baseline = to_memory[:, :baseline_tokens].mean(1, keepdim=True)
        baseline_corrected_mass += (
            (to_memory[:, baseline_tokens:] - BASELINE_FACTOR * baseline).clamp(min=0).sum((0, 1))
        )
        attention_mass += to_memory[:, len(prompt) - 1 :].sum((0, 1))
    expected, at = {}, 0
    for document, tokenized in zip(documents, tokenized_documents, strict=True):
        ends = [*tokenized.starts[1:], len(tokenized.ids)]
        for passage, start, end in zip(document.chunks, tokenized.starts, ends, strict=True):
            part = slice(at + start, at + end)
            expected[passage.location] = (float(baseline_corrected_mass[part].sum()), float(attention_mass[part].sum()))
        at += len(tokenized.ids)
    totals = [sum(each[i] for each in expected.values()) for i in (0, 1)]
    assert len(answer.citations) == sum(share > 0 for share, _ in expected.values())
    for citation in answer.citations:
        share, attention = expected[citation.location]
        assert citation.share == pytest.approx(share / totals[0], abs=1e-4)
        assert citation.attention == pytest.approx(attention / totals[1], abs=1e-4)
    assert [each.share for each in answer.citations] == sorted((each.share for each in answer.citations), reverse=True)
    assert sum(each.share for each in answer.citations) == pytest.approx(1)


def test_a_question_longer_than_a_window_is_cited_too(make_library) -> None:
    answer = ask(make_library(), "the cat sat with the dog and ran home " * 6, citations=9)
    assert answer.question_tokens > 3 * READING["context_length"]
    assert sum(each.share for each in answer.citations) == pytest.approx(1)


def test_a_citation_says_where_its_passage_stands(make_library, files) -> None:
    answer = ask(make_library(), documents=["dogs.md"], citations=9)
    found = {citation.line: citation for citation in answer.citations}
    assert found[5].location == f"{files / 'pets' / 'dogs.md'}:5"
    assert (found[5].title, found[5].text) == ("Bones", "# Bones\n\na dog met a dog with the dog")
    assert len(ask(make_library(), citations=1).citations) == 1
    assert ask(make_library(), citations=0).citations == []


# ---- memories that are kept ------------------------------------------------------------------------------------------


def test_what_was_read_once_is_not_read_again(make_library, read) -> None:
    first = ask(make_library(), documents=["*"])
    assert sorted(read) == ["cats.md", "dogs.md", "money.txt"]
    again = ask(make_library(), documents=["*"])
    assert sorted(read) == ["cats.md", "dogs.md", "money.txt"]
    assert (again.text, again.citations) == (first.text, first.citations)


def test_a_changed_documents_memory_is_never_used_and_goes(make_library, files, read) -> None:
    library = make_library()
    library.precompute_memory(progress=False)
    before, read[:] = set(memories(library)), []
    (files / "cats.md").write_text("# Cats\n\nno cat at all\n")
    library.add(files, progress=False)
    assert len(before - set(memories(library))) == 1
    answer = ask(make_library(), documents=["cats.md"])
    assert read == ["cats.md"]
    assert answer.citations[0].text == "# Cats\n\nno cat at all"
    assert set(memories(library)) & before < before


def test_a_removed_documents_memory_goes(make_library, files) -> None:
    library = make_library()
    library.precompute_memory(progress=False)
    (files / "money.txt").unlink()
    library.add(files, progress=False)
    assert len(memories(library)) == 2


@pytest.mark.parametrize("change", [{"mem_dtype": "int8"}, {"context_length": 32}, {"mem_layers": [1]}])
def test_another_way_of_reading_has_memories_of_its_own(make_library, read, change) -> None:
    ask(make_library(), documents=["money.txt"])
    ask(make_library(**change), documents=["money.txt"])
    assert read == ["money.txt", "money.txt"]


def test_damaged_and_exchanged_memories_are_read_again(make_library, read) -> None:
    library = make_library()
    wanted = [ask(library, documents=[name]).text for name in ("cats", "dogs")]
    one, two = memories(library)
    one.write_bytes(one.read_bytes()[:-9])
    assert [ask(make_library(), documents=[name]).text for name in ("cats", "dogs")] == wanted
    bank = MemoryBank.load(two)
    bank.fingerprint = "another"
    bank.save(two)
    assert [ask(make_library(), documents=[name]).text for name in ("cats", "dogs")] == wanted
    assert len(read) == 4


def test_memory_ahead_stays_within_the_budget_and_drives_nothing_out(make_library, read) -> None:
    report = make_library().precompute_memory(progress=False)
    assert (report.read, report.existing, report.remaining) == (3, 0, 0)
    sizes = [path.stat().st_size for path in memories(make_library())]
    assert report.bytes == sum(sizes)
    for path in memories(make_library()):
        path.unlink()
    budget = max(sizes) + (1 << 16)
    report = make_library(memory_budget=budget).precompute_memory(progress=False)
    assert report.read + report.remaining == 3
    assert 0 < report.bytes <= budget
    read.clear()
    again = make_library(memory_budget=budget).precompute_memory(progress=False)
    assert (again.read, again.existing, again.remaining, read) == (0, report.read, report.remaining, [])


def test_a_library_says_what_its_memories_take(make_library, reader_folder) -> None:
    library = make_library()
    assert "memory" not in library.info()
    ask(library, documents=["*"])
    size = sum(path.stat().st_size for path in memories(library))
    assert library.info()["memory"] == {"memories": 3, "bytes": size, "reader": str(reader_folder)}


def test_asking_works_however_small_the_budget(make_library) -> None:
    wanted = ask(make_library(), documents=["*"]).text
    for path in memories(make_library()):
        path.unlink()
    library = make_library(memory_budget=1)
    assert ask(library, documents=["*"]).text == wanted
    assert memories(library) == []


def test_pages_are_kept_with_their_memory_and_go_with_it(make_library, files, monkeypatch) -> None:
    (files / "long.txt").write_text("the cat sat with the dog " * 200)
    make_library().add(files, progress=False)
    settings = {"mem_search": "pages", "mem_top_k": 2, "context_length": 64}
    library = make_library(**settings)
    wanted = ask(library, documents=["long", "cats"])
    folder = Path(library.path) / "memory"
    assert len(list(folder.glob("*.pages"))) == 2
    monkeypatch.setattr(page_index, "_build", None)  # none are made anew
    again = ask(make_library(**settings), documents=["long", "cats"])
    assert (again.text, again.citations) == (wanted.text, wanted.citations)
    report = make_library(**settings | {"memory_budget": 1}).precompute_memory(progress=False)
    assert (report.bytes, list(folder.glob("*.pages"))) == (0, [])


def test_a_library_knows_who_read_it(make_library, tmp_path, reader_folder, read) -> None:
    ask(make_library(), documents=["money.txt"])
    plain = Library(tmp_path / "lib")
    ask(plain, documents=["money.txt"])
    assert read == ["money.txt"]
    assert plain.qa_source().reader.name == str(reader_folder)


def test_a_loaded_model_reads_too(make_library, reader_folder) -> None:
    wanted = ask(make_library()).text
    model = load_long_model(reader_folder, **READING)
    assert ask(make_library(reader=model)).text == wanted


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_library_that_can_only_be_read_is_asked_all_the_same(make_library) -> None:
    library = make_library()
    folder = Path(library.path)
    folder.chmod(0o500)
    try:
        assert ask(library).citations
    finally:
        folder.chmod(0o700)


def test_a_full_disk_does_not_hide_the_answer(make_library, monkeypatch, caplog) -> None:
    wanted = ask(make_library()).text
    for path in memories(make_library()):
        path.unlink()

    def full(self, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(MemoryBank, "save", full)
    assert ask(make_library()).text == wanted
    assert "can't be stored" in caplog.text


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_documents_are_chosen_by_source_end_stem_or_pattern(make_library, files) -> None:
    source = make_library().qa_source()
    dogs = str(files / "pets" / "dogs.md")
    for name in (dogs, "dogs.md", "pets/dogs.md", "dogs"):
        assert source.resolve_documents([name]) == [dogs]
    assert names(source.resolve_documents(["*.md"])) == ["cats.md", "dogs.md"]
    assert names(source.resolve_documents(["money.txt", "pets/*", "dogs"])) == ["money.txt", "dogs.md"]
    with pytest.raises(LlamoryError, match=r"no document birds.md in the library; give one of these names: .*cats.md"):
        source.resolve_documents(["birds.md"])
    (files / "dogs.txt").write_text("a dog")
    library = make_library()
    library.add(files, progress=False)
    with pytest.raises(LlamoryError, match="dogs may be several documents"):
        library.qa_source().resolve_documents(["dogs"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"question": " "}, "blank"),
        ({"top_documents": 0}, "at least 1 document"),
        ({"max_question_tokens": 2}, "limit of 2"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"source": "*.none"}, "No document was found"),
        ({"documents": ["none"]}, "no document none"),
    ],
)
def test_wrong_questions_are_one_sentence(make_library, settings, words) -> None:
    with pytest.raises(LlamoryError, match=words):
        ask(make_library(), **{"question": QUESTION} | settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mem_layers": []}, "no memory layers"),
        ({"mem_layers": [7]}, "7"),
        ({"mem_dtype": "int3"}, "int3"),
        ({"memory_budget": "much"}, "10GB"),
        ({"reader": "/nowhere"}, "nowhere"),
    ],
)
def test_wrong_readers_are_one_sentence_and_are_not_noted(make_library, settings, words) -> None:
    library = make_library(**settings)
    with pytest.raises(LlamoryError, match=words):
        ask(library)
    assert not (Path(library.path) / "memory" / "reader.json").exists()
    assert ask(make_library()).text


def test_an_empty_library_says_so(tmp_path, model_folder) -> None:
    with pytest.raises(LlamoryError, match="is empty"):
        Library(tmp_path / "new", model_folder).ask("anything")


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_each_question_of_a_chat_brings_its_documents_and_all_stay(make_library) -> None:
    chat = make_library().chat(top_documents=1)
    assert names(chat.ask("the cat", max_new_tokens=4).documents) == ["cats.md"]
    second = chat.ask("a dog", max_new_tokens=4, on_text=None)
    assert names(second.documents) == ["cats.md", "dogs.md"]
    assert {Path(each.source).name for each in second.citations} <= {"cats.md", "dogs.md"}
    assert chat.ask("a dog", max_new_tokens=4).tokens_read == 0
    assert [turn.question for turn in chat.turns] == ["the cat", "a dog", "a dog"]
    assert chat.memory.segments[-1] == "conversation"


def test_documents_chosen_by_hand_are_the_only_ones_of_a_chat(make_library) -> None:
    chat = make_library().chat(documents=["money"])
    for question in ("the cat", "a dog"):
        assert names(chat.ask(question, max_new_tokens=4).documents) == ["money.txt"]


def test_a_chat_is_saved_with_its_documents(make_library, tmp_path) -> None:
    chat = make_library().chat(top_documents=1)
    with pytest.raises(LlamoryError, match="no conversation to save"):
        chat.save(tmp_path / "kept")
    chat.ask("the cat", max_new_tokens=4)
    chat.save(tmp_path / "kept")
    assert names(MemoryBank.load(tmp_path / "kept").segments) == ["cats.md", "conversation"]


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_length", [16, 64])
def test_reading_ahead_goes_on_where_it_was_stopped(make_library, monkeypatch, context_length) -> None:
    wanted = make_library(context_length=context_length)
    wanted.precompute_memory(progress=False)
    whole = {path.name: path.read_bytes() for path in memories(wanted)}
    for path in memories(wanted):
        path.unlink()
    store_memory, stored = Reader.store, []

    def stop(self, document, bank, others=()):
        if len(stored) == 2:
            raise KeyboardInterrupt
        stored.append(document.source)
        return store_memory(self, document, bank, others)

    monkeypatch.setattr(Reader, "store", stop)
    with pytest.raises(KeyboardInterrupt):
        make_library(context_length=context_length).precompute_memory(progress=False)
    monkeypatch.setattr(Reader, "store", store_memory)
    report = make_library(context_length=context_length).precompute_memory(progress=False)
    assert (report.existing, report.read) == (2, 1)
    assert {path.name for path in memories(wanted)} == set(whole)


def test_an_answer_that_was_interrupted_leaves_the_library_as_it_was(make_library) -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt

    library = make_library()
    wanted = ask(library)
    library.qa_source().reader.tokenizer.decode, decode = (
        (lambda ids, **_: "".join(f"{int(i)} " for i in ids)),
        library.qa_source().reader.tokenizer.decode,
    )
    with pytest.raises(KeyboardInterrupt):
        ask(library, on_text=stop)
    library.qa_source().reader.tokenizer.decode = decode
    again = ask(library)
    assert (again.text, again.citations) == (wanted.text, wanted.citations)


def test_a_document_is_tokenized_once(make_library, monkeypatch) -> None:
    tokenized: list[str] = []
    tokenize = StoredDocument.tokenize

    def spy(self, *arguments):
        tokenized.append(self.source)
        return tokenize(self, *arguments)

    monkeypatch.setattr(StoredDocument, "tokenize", spy)
    ask(make_library(), documents=["cats.md"])
    make_library().precompute_memory(progress=False)
    assert len(tokenized) == len(set(tokenized)) == 3
