"""The template is built from any LLaMA-family tokenizer and guards its prompts."""

import copy
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.llara import LlaraTemplate, PreLlamaModel
from llamory.llara.template import PUBLISHED_TEMPLATE, slot_tokens
from llamory.models import base as backbone

TEXT = ["Summarize the above passage within eight words, or predict the following passage.", "A river runs south."]
LLAMA2 = Path(__file__).parents[3] / "shared" / "tokenizers" / "llama2_tokenizer.json"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama3_like():
    """Byte-level BPE with Llama-3's splitting rule, which puts a beginning-of-text token before a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[(special[0], 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=special[0], eos_token=special[1])


def llama2_like():
    """BPE over ▁-words with byte fallback, as a Llama-2 tokenizer is."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=600, special_tokens=special))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def smollm2():
    try:
        return backbone.load_tokenizer("default")
    except LlamoryError as error:
        pytest.skip(str(error))


TOKENIZERS = {"Llama-2 like": llama2_like, "Llama-3 like": llama3_like, "SmolLM2": smollm2}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.skipif(not LLAMA2.exists(), reason="the Llama-2 vocabulary isn't here")
def test_a_llama_2_tokenizer_gets_the_published_ids():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(LLAMA2), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    template = LlaraTemplate.from_tokenizer(tokenizer)
    for name in ("summarize_prompt_ids", "summarize_slot_ids", "predict_prompt_ids", "predict_slot_ids", "ignored_ids"):
        assert getattr(template, name) == getattr(PUBLISHED_TEMPLATE, name)
    assert LlaraTemplate.from_config(LlamaConfig(vocab_size=32016)) == PUBLISHED_TEMPLATE


@pytest.mark.parametrize("slots", [1, 4, 8, 16])
def test_any_tokenizer_gets_slots_that_only_prompts_contain(tokenizer, slots):
    before = len(tokenizer)
    template = LlaraTemplate.from_tokenizer(tokenizer, slots)
    assert len(tokenizer) == before + 2 * slots
    ids = template.summarize_slot_ids + template.predict_slot_ids
    assert tokenizer.convert_ids_to_tokens(list(ids)) == slot_tokens(slots)
    prompt = tokenizer.decode(template.summarize_prompt_ids)
    assert "summarize the above passage within" in prompt
    assert prompt.strip().startswith('",')
    sequence = template.encode(tokenizer, "A river runs south.")
    assert sequence[: len(template.prefix_ids)] == list(template.prefix_ids)
    assert tuple(sequence[-template.slots :]) == template.predict_slot_ids
    assert LlaraTemplate.from_tokenizer(tokenizer, slots) == template
    template.check_tokenizer(tokenizer)


def test_the_beginning_of_text_is_taken_over_where_the_tokenizer_puts_it():
    assert LlaraTemplate.from_tokenizer(llama3_like()).prefix_ids[0] == 0
    assert LlaraTemplate.from_tokenizer(llama2_like()).prefix_ids[0] == 1


def test_truncation_cuts_the_passage_and_never_a_prompt(tokenizer):
    template = LlaraTemplate.from_tokenizer(tokenizer)
    whole, cut = (template.encode(tokenizer, "river " * 50, max_length=n) for n in (10**6, template.overhead() + 5))
    assert len(cut) == template.overhead() + 5
    assert tuple(cut[len(template.prefix_ids) + 5 :]) == template.summarize_block_ids + template.predict_block_ids
    assert cut[: len(template.prefix_ids) + 5] == whole[: len(template.prefix_ids) + 5]
    with pytest.raises(LlamoryError, match="leaves no room"):
        template.encode(tokenizer, "river", max_length=template.overhead())


def test_a_slot_token_in_a_text_is_an_error(tokenizer):
    template = LlaraTemplate.from_tokenizer(tokenizer)
    with pytest.raises(LlamoryError, match="contains a slot token"):
        template.encode(tokenizer, "A river <s1> runs.")


def word_level(words):
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def test_a_tokenizer_that_cannot_hold_the_prompts_is_refused():
    with pytest.raises(LlamoryError, match="reads parts of the prompt"):
        LlaraTemplate.from_tokenizer(word_level(["[UNK]", "river"]))
    with pytest.raises(LlamoryError, match="<s1> is an ordinary word"):
        LlaraTemplate.from_tokenizer(word_level(["[UNK]", "<s1>"]))
    with pytest.raises(LlamoryError, match="at least one slot"):
        LlaraTemplate.from_tokenizer(llama3_like(), slots=0)


def test_a_model_gets_rows_for_the_slots_and_keeps_the_rest(tokenizer):
    size = len(tokenizer)
    template = LlaraTemplate.from_tokenizer(tokenizer)
    for tied in (True, False):
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, tie_word_embeddings=tied)  # fmt: skip
        model = PreLlamaModel(config)
        before = copy.deepcopy(model.state_dict())
        template.prepare_model(model)
        assert model.template == template
        assert LlaraTemplate.from_config(model.config) == template
        rows = model.get_input_embeddings().weight.detach()
        assert rows.shape[0] == model.lm_head.weight.shape[0] == model.config.vocab_size == size + 16
        assert torch.equal(rows[:size], before["model.embed_tokens.weight"])
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
        spread = rows[:size].std(0).mean()
        assert 0.5 * spread < rows[size:].std(0).mean() < 2 * spread
        assert len(rows[size:].unique(dim=0)) == 16
        template.prepare_model(model)  # a prepared model stays as it is
        assert torch.equal(model.get_input_embeddings().weight, rows)


def test_slots_in_spare_rows_of_a_padded_vocabulary_are_initialised_too():
    tokenizer = llama3_like()
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 64, hidden_size=16, intermediate_size=16,
                                         num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    torch.nn.init.zeros_(model.get_input_embeddings().weight[len(tokenizer) :])
    template = LlaraTemplate.from_tokenizer(tokenizer)
    template.prepare_model(model)
    slots = list(template.summarize_slot_ids)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert (model.get_input_embeddings().weight[slots].abs().sum(1) > 0).all()


def test_another_tokenizer_than_the_templates_is_refused():
    template = LlaraTemplate.from_tokenizer(llama3_like())
    with pytest.raises(LlamoryError, match="doesn't fit its tokenizer"):
        template.check_tokenizer(llama2_like())
    other = llama2_like()
    LlaraTemplate.from_tokenizer(other)
    with pytest.raises(LlamoryError, match="doesn't fit its tokenizer"):
        template.check_tokenizer(other)


def test_a_config_that_is_no_whole_template_is_refused():
    for llara, sentence in [({"slots": 8}, "unknown entries"), ({"prefix_ids": [1]}, "not a complete LLARA template")]:
        with pytest.raises(LlamoryError, match=sentence):
            LlaraTemplate.from_config(LlamaConfig(llara=llara))
    assert LlaraTemplate.from_config(LlamaConfig(vocab_size=32000)) is None
