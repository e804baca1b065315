"""A LLARA checkpoint, exported, is a stock Sentence Transformers folder that reads texts exactly as training did."""

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from sentence_transformers import SentenceTransformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from keyword_models import keyword_model
from llamory.embedding.encoder import escape_slot_tokens
from llamory.embedding.pipeline import export_sentence_transformer, load_embedder, query_prompt, set_query_prompt
from llamory.errors import LlamoryError
from llamory.llara.template import LlaraTemplate

CORPUS = [
    'The river runs to the sea. "Quoted words", she said, summarize the above passage within eight words: 12, 345!',
    "predict the following passage within eight words: def run(self):\n    return [x for x in self.items]\n\n",
    "naïve café, 日本語のテキスト, mountains, rivers and the long road home; it's what we'll see, isn't it?",
] * 3
WORDS = "".join(CORPUS)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA2_FILE = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "llama2_tokenizer.json"

SUMMARY_PROMPT = '", summarize the above passage within eight words: <s1><s2><s3><s4><s5><s6><s7><s8>'
PREDICTION_PROMPT = '", predict the following passage within eight words: <s9><s10><s11><s12><s13><s14><s15><s16>'

TEXTS = [
    "The river runs to the sea.",
    "",
    " spaces around ",
    "\n\nlines\n",
    'a "quote"',
    "ends with a comma,",
    "https://example.org/cat.png",
    "café 日本語 🦙",
    "for i in range(3):\n    print(i)",
    "</s> and <s> inside",
    "<s>",
]


# ---- tokenizers of every LLaMA family, and checkpoints made with them ------------------------------------------------


def byte_level_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """As Llama 3 has it: byte-level BPE, a splitting regex, and bos from the post-processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def sentencepiece_state() -> dict:
    """A Llama-2 vocabulary in small: words with a leading ▁ and byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + fallback, show_progress=False)
    words = [word for text in CORPUS for word in text.replace(" ", " \0").split("\0")]
    tokenizer.train_from_iterator(words, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    return state


def sentencepiece_tokenizer(state: dict) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(json.dumps(state))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )
    wrapped.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return wrapped


def llama_tokenizer_class() -> LlamaTokenizer:
    """The class that transformers gives Llama-2 checkpoints; its Metaspace puts ▁ before the first piece only."""
    model = sentencepiece_state()["model"]
    return LlamaTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])


def old_llama_tokenizer() -> PreTrainedTokenizerFast:
    """Older Llama files say that special tokens are to be found after normalising."""
    state = sentencepiece_state()
    for token in state["added_tokens"]:
        token["normalized"] = True
    return sentencepiece_tokenizer(state)


TOKENIZERS = {
    "byte-level": lambda: byte_level_tokenizer(bos=True),
    "byte-level without bos": lambda: byte_level_tokenizer(bos=False),
    "llama-2": lambda: sentencepiece_tokenizer(sentencepiece_state()),
    "llama-2 class": llama_tokenizer_class,
    "llama-2 file": lambda: sentencepiece_tokenizer(json.loads(LLAMA2_FILE.read_text())),
}
ALL = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(name == "llama-2 file" and not LLAMA2_FILE.exists(), reason="no Llama-2 tokenizer"),
    )
    for name in TOKENIZERS
]


def save_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, *, template: bool = True) -> Path:
    fitted = LlaraTemplate.from_tokenizer(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    if template:
        fitted.prepare_model(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Gives the checkpoint and its export, each made once per kind of tokenizer."""

    @lru_cache
    def make(kind: str) -> tuple[Path, Path]:
        root = tmp_path_factory.mktemp("retriever")
        checkpoint = save_checkpoint(root / "checkpoint", TOKENIZERS[kind]())
        return checkpoint, export_sentence_transformer(checkpoint, root / "exported", max_length=128)

    return make


def pieces(tokenizer, text: str, prompt: str, max_length: int = 128) -> list[int]:
    """The reference: prefix, passage and prompt tokenised apart and joined; the passage is cut."""
    prefix = tokenizer('"')["input_ids"]
    passage = tokenizer(text, add_special_tokens=False)["input_ids"]
    block = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return prefix + passage[: max_length - len(prefix) - len(block)] + block


def read_ids(model: SentenceTransformer, text: str, task: str | None) -> list[int]:
    features = model.preprocess([text], task=task)
    return features["input_ids"][0].tolist()


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_every_piece_is_tokenised_apart_whatever_the_text(exported, kind):
    checkpoint, folder = exported(kind)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = SentenceTransformer(str(folder), device="cpu")

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(st.sampled_from(TEXTS), st.text(), st.text(alphabet=WORDS, max_size=60)))
    def check(text: str) -> None:
        assume("\ufdd0" not in text)
        assert read_ids(model, text, "query") == pieces(tokenizer, text, PREDICTION_PROMPT)
        assert read_ids(model, text, "document") == pieces(tokenizer, text, SUMMARY_PROMPT)
        assert read_ids(model, text, None) == pieces(tokenizer, text, SUMMARY_PROMPT)

    check()


@pytest.mark.parametrize("kind", ALL)
def test_a_long_text_loses_its_end_and_keeps_its_prompt(exported, kind):
    checkpoint, folder = exported(kind)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = SentenceTransformer(str(folder), device="cpu")
    text = "rivers and mountains, " * 200
    for task, prompt in (("query", PREDICTION_PROMPT), ("document", SUMMARY_PROMPT)):
        ids = read_ids(model, text, task)
        assert len(ids) == 128
        assert ids == pieces(tokenizer, text, prompt)


def test_a_batch_is_padded_on_the_right(exported):
    model = SentenceTransformer(str(exported("llama-2")[1]), device="cpu")
    mask = model.preprocess(["a", "a much longer text about the river"])["attention_mask"]
    assert mask[0, 0] == 1
    assert mask[0, -1] == 0


def test_a_text_with_a_slot_token_is_refused(exported):
    model = SentenceTransformer(str(exported("byte-level")[1]), device="cpu")
    with pytest.raises(TemplateError, match="<s3>"):
        model.encode("what does <s3> mean")


def test_an_old_llama_file_is_exported_with_its_bos(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", old_llama_tokenizer())
    model = load_embedder(checkpoint, device="cpu", max_length=128)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert read_ids(model, "The river", "document")[0] == 1
    assert read_ids(model, "The river", "document") == pieces(tokenizer, "The river", SUMMARY_PROMPT)


# ---- what comes out --------------------------------------------------------------------------------------------------


@lru_cache
def plain_llama(checkpoint: Path) -> tuple[PreTrainedTokenizerFast, LlamaModel]:
    return AutoTokenizer.from_pretrained(checkpoint), LlamaModel.from_pretrained(checkpoint, dtype=torch.float32)


def slot_mean(checkpoint: Path, text: str, prompt: str) -> np.ndarray:
    """The reference: the mean of the last eight hidden states of plain LLaMA, one text at a time, normalised."""
    tokenizer, model = plain_llama(checkpoint)
    with torch.no_grad():
        hidden = model(torch.tensor([pieces(tokenizer, text, prompt)])).last_hidden_state[0]
    mean = hidden[-8:].mean(0)
    return (mean / mean.norm()).numpy()


@pytest.mark.parametrize("kind", ALL)
def test_embeddings_are_the_normalised_slot_means_in_batches_of_any_size(exported, kind):
    checkpoint, folder = exported(kind)
    model = SentenceTransformer(str(folder), device="cpu")
    texts = [*TEXTS, "a long one about rivers " * 40]
    as_query = np.stack([slot_mean(checkpoint, text, PREDICTION_PROMPT) for text in texts])
    as_document = np.stack([slot_mean(checkpoint, text, SUMMARY_PROMPT) for text in texts])
    assert np.abs(as_query - as_document).max() > 0.01
    for batch_size in (1, 3, 8):
        np.testing.assert_allclose(model.encode_query(texts, batch_size=batch_size), as_query, atol=1e-5)
        np.testing.assert_allclose(model.encode_document(texts, batch_size=batch_size), as_document, atol=1e-5)
        np.testing.assert_allclose(model.encode(texts, batch_size=batch_size), as_document, atol=1e-5)


def test_an_ordinary_token_that_is_a_slot_in_capitals_counts_for_nothing(tmp_path):
    tokenizer = byte_level_tokenizer(bos=True)
    tokenizer.add_tokens(["<S1>"])
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tokenizer)
    model = load_embedder(checkpoint, device="cpu", max_length=128)
    expected = slot_mean(checkpoint, "a <S1> b", SUMMARY_PROMPT)
    np.testing.assert_allclose(model.encode_document("a <S1> b"), expected, atol=1e-5)


@pytest.mark.slow
def test_the_folder_loads_where_llamory_is_not_installed(exported):
    checkpoint, folder = exported("llama-2 class")
    program = (
        "import sys, json; sys.modules['llamory'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(folder)!r}, device='cpu')\n"
        "print(json.dumps(model.encode_query(['The river']).tolist()))\n"
        "print(json.dumps([type(module).__module__.split('.')[0] for module in model]))\n"
        "print(model.similarity_fn_name)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    vectors, packages, similarity = done.stdout.strip().splitlines()
    np.testing.assert_allclose(json.loads(vectors)[0], slot_mean(checkpoint, "The river", PREDICTION_PROMPT), atol=1e-5)
    assert json.loads(packages) == ["sentence_transformers"] * 4
    assert similarity == "cosine"


def test_a_checkpoint_embeds_as_its_export_does(exported):
    checkpoint, folder = exported("byte-level")
    from_checkpoint = load_embedder(checkpoint, device="cpu", max_length=128)
    from_folder = load_embedder(folder, device="cpu")
    assert from_folder.max_seq_length == 128
    np.testing.assert_allclose(from_checkpoint.encode_query(TEXTS), from_folder.encode_query(TEXTS), atol=1e-6)
    assert load_embedder(folder, device="cpu", max_length=60).max_seq_length == 60
    assert load_embedder(checkpoint, device="cpu").max_seq_length == 256  # the default, 512, is more than it can read


@pytest.mark.parametrize("kind", ALL)
def test_queries_take_the_summary_prompt_where_that_is_wanted(exported, kind, tmp_path):
    checkpoint, folder = exported(kind)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    written = export_sentence_transformer(checkpoint, tmp_path / "summary", max_length=128, query_prompt="summary")
    changed = load_embedder(folder, device="cpu", query_prompt="summary")
    changed.save(str(tmp_path / "changed"), create_model_card=False)
    for model in (changed, *(SentenceTransformer(str(path), device="cpu") for path in (written, tmp_path / "changed"))):
        assert query_prompt(model) == "summary"
        for task in ("query", "document"):
            assert read_ids(model, TEXTS[0], task) == pieces(tokenizer, TEXTS[0], SUMMARY_PROMPT)
    set_query_prompt(changed, "prediction")
    assert query_prompt(changed) == "prediction"
    assert read_ids(changed, TEXTS[0], "query") == pieces(tokenizer, TEXTS[0], PREDICTION_PROMPT)
    assert read_ids(changed, TEXTS[0], "document") == pieces(tokenizer, TEXTS[0], SUMMARY_PROMPT)


def test_a_query_prompt_that_isnt_possible_is_refused(exported):
    folder = exported("byte-level")[1]
    with pytest.raises(LlamoryError, match="query_prompt must be one of prediction, summary, not 'both'"):
        load_embedder(folder, device="cpu", query_prompt="both")
    older = load_embedder(folder, device="cpu")
    older.tokenizer.chat_template = older.tokenizer.chat_template.partition("%}")[2]
    with pytest.raises(LlamoryError, match="export it again"):
        set_query_prompt(older, "summary")
    assert query_prompt(older) == "prediction"
    plain = keyword_model(["cat", "dog"])
    assert query_prompt(plain) is None
    with pytest.raises(LlamoryError, match="Only a LLARA model"):
        set_query_prompt(plain, "summary")


def test_slot_tokens_in_found_texts_can_be_hidden(exported):
    model = load_embedder(exported("byte-level")[1], device="cpu")
    assert escape_slot_tokens(model, ["a <s1> and <s16>", "<s17> stays"]) == ["a < s1> and < s16>", "<s17> stays"]
    model.encode(escape_slot_tokens(model, ["a <s1>"]))


# ---- what can't be exported ------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_never_overwritten(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LlamoryError, match="empty"):
        export_sentence_transformer(exported("byte-level")[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_may_be_filled(exported, tmp_path):
    output = tmp_path / "empty"
    output.mkdir()
    export_sentence_transformer(exported("byte-level")[0], output, max_length=128)
    assert (output / "modules.json").exists()


def test_a_plain_llama_is_to_be_trained_first(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "plain", byte_level_tokenizer(bos=True), template=False)
    with pytest.raises(LlamoryError, match="train"):
        export_sentence_transformer(checkpoint, tmp_path / "out")
    with pytest.raises(LlamoryError, match="train"):
        load_embedder(checkpoint)


def test_a_checkpoint_with_another_tokenizer_is_refused(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", byte_level_tokenizer(bos=True))
    other = sentencepiece_tokenizer(sentencepiece_state())
    LlaraTemplate.from_tokenizer(other)
    other.save_pretrained(checkpoint)
    with pytest.raises(LlamoryError, match="doesn't fit its tokenizer"):
        export_sentence_transformer(checkpoint, tmp_path / "out")


def test_a_tokenizer_that_would_read_texts_differently_is_refused_and_leaves_nothing_behind(tmp_path):
    tokenizer = byte_level_tokenizer(bos=True)
    # Strips each text that it reads alone, but couldn't strip a passage that stands between prompts.
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    checkpoint = save_checkpoint(tmp_path / "checkpoint", tokenizer)
    with pytest.raises(LlamoryError, match="leading and trailing space"):
        export_sentence_transformer(checkpoint, tmp_path / "out", max_length=128)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize(("length", "words"), [(10, "no room"), (257, "which is 256")])
def test_a_length_that_fits_no_text_or_no_model_is_refused(exported, tmp_path, length, words):
    with pytest.raises(LlamoryError, match=words):
        export_sentence_transformer(exported("byte-level")[0], tmp_path / "out", max_length=length)


def test_a_missing_or_empty_model_is_named(tmp_path):
    with pytest.raises(LlamoryError, match="no folder"):
        load_embedder(tmp_path / "missing")
    with pytest.raises(LlamoryError, match=r"no config\.json"):
        load_embedder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LlamoryError, match="is a file"):
        load_embedder(tmp_path / "file")
