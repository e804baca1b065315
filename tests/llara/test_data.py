"""LLARA examples and batches: published files and documents become the sequences and targets of the paper."""

import json
import logging
import os
import re
import sys
import unicodedata
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llamory.documents import readers as documents_files
from llamory.errors import LlamoryError
from llamory.llara.data import (
    LlaraCollator,
    content_words,
    load_examples,
    split_words,
    stop_words,
    truncate_at_word,
    word_ids,
)
from llamory.llara.template import PUBLISHED_TEMPLATE, LlaraTemplate

LLAMA2 = Path(__file__).parents[2].parent / "shared" / "tokenizers" / "llama2_tokenizer.json"
SUMMARIZE = '", summarize the above passage within eight words: <s1><s2><s3><s4><s5><s6><s7><s8>'
PREDICT = '", predict the following passage within eight words: <s9><s10><s11><s12><s13><s14><s15><s16>'
TEXT = "Bees_make honey, and the queen rules. It rains in the green hills; bees don't like that."


def as_llama(whole: Tokenizer) -> PreTrainedTokenizerFast:
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """A small tokenizer made as Llama 2's: spaces are marked, one is put before a text, `<s>` opens a sequence."""
    whole = Tokenizer(models.BPE(unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    whole.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = ["\n", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator([SUMMARIZE, PREDICT, TEXT], trainer)
    return as_llama(whole)


@pytest.fixture(scope="module")
def template(llama_like) -> LlaraTemplate:
    return LlaraTemplate.from_tokenizer(llama_like)


@pytest.fixture
def load(llama_like, template, tmp_path):
    def load(paths, **settings):
        return load_examples(
            paths, llama_like, template, **{"cache_dir": tmp_path / ".cache", "quiet": True, **settings}
        )

    return load


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write_lines(path: Path, *entries: object) -> Path:
    path.write_text("".join(e + "\n" if isinstance(e, str) else json.dumps(e) + "\n" for e in entries))
    return path


def words(tokenizer: PreTrainedTokenizerFast, example: dict, head: str) -> list[str]:
    return tokenizer.decode(example[f"{head}_ids"]).split()


# ---- the published format --------------------------------------------------------------------------------------------


def test_a_published_example_is_the_paper_s_sequence(load, llama_like, tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl",
        {
            "input": TEXT,
            "output_summarize": "The_queen rules, and bees!",
            "output_predict": ["the", "don't", "hills_x"],
        },
        {"input": "It rains.", "output_summarize": None},
    )
    first, second = load(path)
    prefix, passage = llama_like('"')["input_ids"], ids(llama_like, TEXT)
    suffix = ids(llama_like, SUMMARIZE) + ids(llama_like, PREDICT)
    assert first["input_ids"] == prefix + passage + suffix
    assert first["labels"] == [-100] * len(prefix) + passage + [-100] * len(suffix)
    assert first["summarize_ids"] == ids(llama_like, "queen rules bees")
    assert first["predict_ids"] == ids(llama_like, "the don't hills_x")
    assert (first["source"], first["example"]) == (f"{path}:1", 0)
    assert second["input_ids"] == prefix + ids(llama_like, "It rains.") + suffix
    assert (second["summarize_ids"], second["predict_ids"], second["example"]) == ([], [], 1)


def test_a_long_input_is_truncated_but_its_targets_are_not(load, llama_like, template, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"input": TEXT, "output_summarize": "green hills"})
    [example] = load(path, max_length=template.overhead() + 5)
    suffix = ids(llama_like, SUMMARIZE) + ids(llama_like, PREDICT)
    assert example["input_ids"] == llama_like('"')["input_ids"] + ids(llama_like, TEXT)[:5] + suffix
    assert example["summarize_ids"] == ids(llama_like, "green hills")


@pytest.mark.skipif(not LLAMA2.exists(), reason="needs the Llama-2 tokenizer")
def test_llama_2_gives_the_published_ids(tmp_path):
    tokenizer = as_llama(Tokenizer.from_file(str(LLAMA2)))
    template = LlaraTemplate.from_tokenizer(tokenizer)
    path = write_lines(tmp_path / "a.jsonl", {"input": TEXT, "output_summarize": TEXT, "output_predict": ["rain"]})
    [example] = load_examples(path, tokenizer, template, cache_dir=tmp_path / ".cache", quiet=True)
    passage = ids(tokenizer, TEXT)
    summary_block = [9162, 19138, 675, 278, 2038, 13382, 2629, 9475, 3838, 29901, 29871]
    summary_block += [32008, 32011, 32004, 32013, 32007, 32005, 32002, 32014]
    prediction_block = [9162, 8500, 278, 1494, 13382, 2629, 9475, 3838, 29901, 29871]
    prediction_block += [32000, 32009, 32012, 32001, 32010, 32003, 32006, 32015]
    assert example["input_ids"] == [1, 376, *passage, *summary_block, *prediction_block]
    assert example["labels"] == [-100, -100, *passage, *[-100] * 37]
    assert template.predict_slot_ids == PUBLISHED_TEMPLATE.predict_slot_ids
    assert example["summarize_ids"] == ids(tokenizer, "Bees make honey queen rules rains green hills bees like")
    assert tokenizer.convert_ids_to_tokens(example["predict_ids"]) == ["▁rain"]


@settings(max_examples=25, deadline=None)
@given(text=st.lists(st.sampled_from([*"abeh.,_-'!\" ", "the ", "Bees ", "hills"]), max_size=40).map("".join))
def test_text_targets_are_the_words_left_by_the_published_rule(llama_like, template, tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("published")
    path = write_lines(folder / "a.jsonl", {"input": "x", "output_summarize": text})
    [example] = load_examples(path, llama_like, template, languages=(), cache_dir=folder, quiet=True)
    assert example["summarize_ids"] == ids(llama_like, " ".join(re.sub(r"[\W_]+", " ", text).split()))


# ---- documents -------------------------------------------------------------------------------------------------------


def test_a_passage_summarises_itself_and_predicts_the_next_of_its_document(load, llama_like, tmp_path):
    (tmp_path / "a.md").write_text("# Bees\n\nThe bees make honey.\n\n# Rain\n\nIt rains in green hills.\n")
    (tmp_path / "b.txt").write_text("The queen rules.")
    examples = load(tmp_path)
    assert [e["source"] for e in examples] == [f"{tmp_path}/a.md:1", f"{tmp_path}/a.md:5", f"{tmp_path}/b.txt:1"]
    assert [words(llama_like, e, "summarize") for e in examples] == [
        ["Bees", "bees", "make", "honey"],
        ["Rain", "rains", "green", "hills"],
        ["queen", "rules"],
    ]
    assert [words(llama_like, e, "predict") for e in examples] == [["Rain", "rains", "green", "hills"], [], []]


def test_passages_are_as_long_as_asked(load, llama_like, template, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT * 5)
    for chunk_size, most in ((8, 8), (None, 70 - template.overhead())):
        lengths = [sum(i != -100 for i in e["labels"]) for e in load(tmp_path, chunk_size=chunk_size, max_length=70)]
        assert most - 8 < max(lengths) <= most


def test_words_that_truncation_cuts_away_are_no_targets(load, llama_like, template, tmp_path):
    (tmp_path / "a.md").write_text("# Bees\n\nhoney queen rules\n\n# Rain\n\ngreen hills like honey\n")
    for room in range(1, 20):
        first, second = load(tmp_path, chunk_size=100, max_length=template.overhead() + room)
        for example, targets in ((first, first["summarize_ids"]), (second, second["summarize_ids"])):
            kept = llama_like.decode([i for i in example["labels"] if i != -100])
            assert len(ids(llama_like, kept)) <= room
            found = set(llama_like.decode(targets).split())
            assert found <= set(kept.split())
            assert found <= {"Bees", "honey", "queen", "rules", "Rain", "green", "hills", "like"}  # whole words
        assert first["predict_ids"] == second["summarize_ids"]
    full = load(tmp_path, chunk_size=100)[1]
    assert words(llama_like, full, "summarize") == ["Rain", "green", "hills", "like", "honey"]


def test_stop_words_follow_the_language(load, llama_like, tmp_path):
    (tmp_path / "a.txt").write_text("Die Bienen und the honey")
    targets = {
        languages: words(llama_like, load(tmp_path, languages=languages)[0], "summarize")
        for languages in (("de",), ("en", "de"), ())
    }
    assert targets == {
        ("de",): ["Bienen", "the", "honey"],
        ("en", "de"): ["Bienen", "honey"],
        (): ["Die", "Bienen", "und", "the", "honey"],
    }
    with pytest.raises(LlamoryError, match="language 'xx'"):
        load(tmp_path, languages=("xx",))


def test_a_folder_may_hold_both_kinds(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", {"input": "Bees make honey.", "output_predict": "rain"})
    write_lines(tmp_path / "b.jsonl", {"body": "The queen rules."})
    (tmp_path / "c.html").write_text("<h1>Rain</h1><p>It rains in the hills.")
    examples = load(tmp_path, text_field="body")
    assert [Path(e["source"]).name for e in examples] == ["a.jsonl:1", "b.jsonl:1", "c.html:1"]
    assert [e["example"] for e in examples] == [0, 1, 2]


# ---- what is broken --------------------------------------------------------------------------------------------------

BROKEN = {
    '{"input": "x"': "not valid JSON",
    '{"input": 3}': "'input' should be a string",
    '{"text": "x"}': "no 'input'",
    '{"input": "x", "output_summarize": 7}': "'output_summarize' should be a string",
    '{"input": "x", "output_predict": ["a", 7]}': "'output_predict' should be a string",
    '{"input": "x <s3>"}': "slot token <s3>",
    '{"input": "x", "output_predict": ["<s3>"]}': "slot token <s3>",
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("line", "reason"), BROKEN.items())
def test_a_broken_line_is_named_with_its_number(load, tmp_path, line, reason, streaming):
    path = write_lines(tmp_path / "a.jsonl", {"input": "Bees."}, line)
    with pytest.raises(LlamoryError, match=rf"a\.jsonl:2: .*{reason}"):
        list(load(path, streaming=streaming))


def test_broken_lines_can_be_passed_over(load, tmp_path, caplog):
    path = write_lines(tmp_path / "a.jsonl", *BROKEN, {"input": "Bees."}, {"input": " "})
    with caplog.at_level(logging.WARNING):
        [example] = load(path, skip_broken=True)
    assert example["source"] == f"{path}:{len(BROKEN) + 1}"
    assert f"{len(BROKEN)} broken lines" in caplog.text


def test_a_slot_token_in_a_document_is_named_with_its_line(load, tmp_path):
    (tmp_path / "a.md").write_text(
        "# Bees\n\nThey make honey.\n\n# Slots\n\nThey read\n<s12> here.\n\n# Rain\n\nIt rains now.\n"
    )
    with pytest.raises(LlamoryError, match=r"a\.md:8: .*<s12>"):
        load(tmp_path)
    kept = load(tmp_path, skip_broken=True)
    assert [e["source"] for e in kept] == [f"{tmp_path}/a.md:1", f"{tmp_path}/a.md:10"]
    assert kept[0]["predict_ids"] == []


def test_an_error_in_another_process_is_told_the_same(load, tmp_path):
    (tmp_path / "a.txt").write_text("Bees.")
    write_lines(tmp_path / "b.jsonl", "[]")
    with pytest.raises(LlamoryError, match=r"b\.jsonl:1: .*JSON object"):
        load(tmp_path, num_proc=2)


@pytest.mark.parametrize("streaming", [False, True])
def test_no_usable_example_is_an_error(load, tmp_path, streaming):
    path = write_lines(tmp_path / "a.jsonl", "{", {"input": "  "})
    with pytest.raises(LlamoryError, match="No example could be made"):
        load(path, skip_broken=True, streaming=streaming)


def test_settings_that_leave_no_room_are_errors(load, template, tmp_path):
    (tmp_path / "a.txt").write_text("Bees.")
    with pytest.raises(LlamoryError, match="leaves no room"):
        load(tmp_path, max_length=template.overhead())
    with pytest.raises(LlamoryError, match="chunk_size must be at least 1"):
        load(tmp_path, chunk_size=0)


# ---- caching, processes, streaming -----------------------------------------------------------------------------------


def test_work_is_done_once_until_a_file_or_a_setting_changes(load, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("Bees make honey.")
    load(path)
    reads = []
    read = documents_files.read_limited
    monkeypatch.setattr(documents_files, "read_limited", lambda path, limit: reads.append(path) or read(path, limit))
    assert len(load(path)) == 1
    assert reads == []
    for changed in ({"languages": ("de",)}, {"max_length": 100}, {"chunk_size": 5}):
        load(path, **changed)
        assert reads.pop() == path
        load(path, **changed)
        assert reads == []


def test_a_changed_file_of_the_same_size_is_read_again(load, llama_like, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("honey")
    os.utime(path, ns=(1, 1))
    load(path)
    path.write_text("queen")
    os.utime(path, ns=(2, 2))
    assert words(llama_like, load(path)[0], "summarize") == ["queen"]


def test_another_template_is_not_served_from_the_cache(llama_like, template, load, tmp_path):
    (tmp_path / "a.txt").write_text("honey")
    before = load(tmp_path)[0]["input_ids"]
    smaller = LlaraTemplate.from_tokenizer(llama_like, slots=4)
    after = load_examples(tmp_path, llama_like, smaller, cache_dir=tmp_path / ".cache", quiet=True)[0]["input_ids"]
    assert len(after) < len(before)


def test_processes_and_streaming_give_the_same_examples(load, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"{TEXT} Hive {i}. " * 6)
    plain = list(load(tmp_path, chunk_size=20))
    assert [e["example"] for e in plain] == list(range(len(plain)))
    assert list(load(tmp_path, chunk_size=20, num_proc=2, cache_dir=tmp_path / ".other")) == plain
    assert list(load(tmp_path, chunk_size=20, streaming=True)) == plain


def test_streaming_reads_only_as_far_as_it_is_asked(load, tmp_path):
    write_lines(tmp_path / "a.jsonl", *[{"input": f"Bees {i}."} for i in range(200)], "broken")
    stream = iter(load(tmp_path, streaming=True))
    assert next(stream)["source"].endswith("a.jsonl:1")
    with pytest.raises(LlamoryError, match=":201"):
        list(stream)


@pytest.mark.parametrize("stop", [1, 64, 100])
def test_a_stream_resumes_where_it_stopped(load, tmp_path, stop):
    for i in range(3):
        write_lines(tmp_path / f"{i}.jsonl", *[{"input": f"Bees {i} {j}."} for j in range(50)])
    whole = list(load(tmp_path, streaming=True))
    first = load(tmp_path, streaming=True)
    stream = iter(first)
    seen = [next(stream) for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    second = load(tmp_path, streaming=True)
    second.load_state_dict(state)
    assert seen + list(second) == whole


def test_quiet_leaves_the_progress_bars_as_they_were(load, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("honey")
    load(tmp_path)
    assert capfd.readouterr().err == ""
    assert not datasets.utils.are_progress_bars_disabled()


# ---- batches ---------------------------------------------------------------------------------------------------------

EXAMPLES = [
    {"input_ids": [1, 5, 6], "labels": [-100, 5, -100], "summarize_ids": [7], "predict_ids": [], "example": 3},
    {"input_ids": [1, 6], "labels": [-100, 6], "summarize_ids": [8, 9], "predict_ids": [], "example": 4},
]


def test_a_batch_is_padded_on_the_left():
    batch = LlaraCollator(2)(EXAMPLES)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 5, 6], [2, 1, 6]],
        "attention_mask": [[1, 1, 1], [0, 1, 1]],
        "labels": [[-100, 5, -100], [-100, -100, 6]],
        "output_summarize_ids": [[7, -100], [8, 9]],
        "output_predict_ids": [[-100], [-100]],
        "example": [3, 4],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    assert LlaraCollator(None)(EXAMPLES)["input_ids"].tolist() == [[1, 5, 6], [0, 1, 6]]


def test_loaded_examples_make_a_batch(load, tmp_path):
    (tmp_path / "a.md").write_text("# Bees\n\nThe bees make honey.\n\n# Rain\n\nIt rains in green hills.\n")
    examples = load(tmp_path)
    batch = LlaraCollator(0)([examples[0], examples[1]])
    assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in examples]
    assert batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist() == examples[0]["input_ids"]


def test_english_stop_words_are_dropped_whatever_their_case():
    dropped = stop_words(["en"])
    text = "The bees don't_make THEIR honey, and it's not the queen's!"
    assert content_words(text, dropped) == ["bees", "make", "honey", "queen"]


def test_words_with_meaning_are_kept():
    dropped = stop_words(["en"])
    assert {"world", "system", "number", "file", "hello"}.isdisjoint(dropped)


@pytest.mark.parametrize(
    ("language", "text", "kept"),
    [
        ("de", "Die Bienen und der Honig sind für dich", ["Bienen", "Honig"]),
        ("fr", "L'abeille est dans la ruche", ["abeille", "ruche"]),
        ("es", "La abeja está en una colmena", ["abeja", "colmena"]),
        ("ca", "Cansats d'uns arbres", ["Cansats", "arbres"]),
        ("ru", "Пчела и мёд не в улье", ["Пчела", "мёд", "улье"]),
        ("pl", "Pszczoła i miód są dla nas", ["Pszczoła", "miód"]),
        ("hi", "मधुमक्खी और शहद के लिए", ["मधुमक्खी", "शहद"]),
    ],
)
def test_other_languages_have_their_own_stop_words(language, text, kept):
    assert content_words(text, stop_words([language])) == kept


def test_several_languages_add_up_and_none_drops_nothing():
    assert stop_words(["en", "de"]) == stop_words(["en"]) | stop_words(["de"])
    assert content_words("The und", stop_words([])) == ["The", "und"]


def test_an_unknown_language_is_told_with_the_known_ones():
    with pytest.raises(LlamoryError, match=r"'klingon'; known are .*\bde\b.*\ben\b"):
        stop_words(["en", "klingon"])


def test_words_are_split_as_published_except_that_marks_stay_in_their_words():
    # Unassigned characters and the two joiners (in Persian and Hindi words) are left out of the comparison.
    skipped = {"Mn", "Mc", "Me", "Cn", "Cs", "Cf"}
    characters = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in skipped]
    unlike = [c for c in characters if split_words(f"a{c}b") != re.sub(r"[\W_]+", " ", f"a{c}b").split()]
    # Python and the library follow different Unicode versions, so a few new letters may differ.
    assert all(ord(c) > 0x3FF for c in unlike)
    assert len(unlike) < 20
    assert split_words("हिन्दी में") == ["हिन्दी", "में"]


def test_a_word_that_is_cut_in_two_is_left_out():
    text = "one two, three"
    assert [truncate_at_word(text, end) for end in (0, 2, 3, 4, 7, 11, 14)] == [
        "",
        "",
        "one",
        "one ",
        "one two",
        "one two, ",
        text,
    ]


def tokenizer(pre: pre_tokenizers.PreTokenizer, tokens: list[str], **settings: object) -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<unk>", *tokens])}, unk_token="<unk>"))
    whole.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", **settings)


def test_every_word_has_the_form_that_it_has_inside_a_text():
    byte_level = tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False), ["the", "Ġthe", "bees", "Ġbees"])
    assert word_ids(byte_level, [["bees", "bees"], [], ["the"]], ()) == [[4, 4], [], [2]]


def test_no_space_is_added_where_the_tokenizer_adds_one():
    llama = tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"), ["▁", "▁the", "▁bees", "bees"])
    assert word_ids(llama, [["bees", "bees"], ["the"]], ()) == [[3, 3], [2]]
    whole = Tokenizer(models.BPE({"▁": 0, "b": 1, "▁b": 2, "t": 3, "h": 4, "e": 5}, [("▁", "b")]))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Replace("▁", " ")
    assert word_ids(PreTrainedTokenizerFast(tokenizer_object=whole), [["b", "b"]], ()) == [[2, 2]]


def test_ignored_ids_are_no_targets():
    words = tokenizer(pre_tokenizers.WhitespaceSplit(), ["the", "bees"])
    assert word_ids(words, [["bees", "unknown", "bees"]], {0}) == [[2, 2]]
