"""Target words: what counts as a word, which are dropped, and their ids."""

import re
import sys
import unicodedata

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.llara.data import content_words, split_words, stop_words, truncate_at_word, word_ids


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
