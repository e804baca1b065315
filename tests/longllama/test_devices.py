"""LongLLaMA on a GPU: the model, its memory there or on the CPU, adapters, placed layers, and the kernels it calls.

Without a GPU there is a pretended one, on which tensors of different devices can't meet either.
"""

import inspect
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import cuda_kernels
from llamory.longllama import LongLlamaForCausalLM, crossbatch
from llamory.longllama.flash_backward import AttentionPart, attend_part_backward
from llamory.memory import MemoryBank
from llamory.memory.search import exact, page_index, pages
from llamory.memory.search import faiss as faiss_index
from llamory.memory.search.base import flash
from llamory.qa.attribution import AttentionRecorder
from pretend_device import can_pretend, pretended_cuda

SHORT = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
EFFICIENT = "_scaled_dot_product_efficient_attention"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def calls():
    """Counts the operations on a pretended GPU; None where there is a real one."""
    if torch.cuda.is_available():
        yield None
    elif can_pretend():
        with pretended_cuda() as counter:
            yield counter
    else:
        pytest.skip("this torch has CUDA of its own but no GPU")


@pytest.fixture
def gpu(calls):
    """The first GPU, real or pretended."""
    return torch.device("cuda:0")


@pytest.fixture
def pretended(calls):
    """A GPU that must be a pretended one."""
    return calls if calls is not None else pytest.skip("there is a real GPU")


@pytest.fixture
def small(monkeypatch):
    """Pages and indexes from 256 tokens on; six queries of a head travel to memory, more wait for it."""
    monkeypatch.setattr(page_index, "STABLE_STEP", 256)
    monkeypatch.setattr(pages, "EXACT_TOKENS", 64)
    monkeypatch.setattr(exact, "MAX_TRANSFERRED_QUERIES", 6)
    monkeypatch.setattr(faiss_index, "LENGTHS", (256,))


def places(*banks):
    """Where the tokens of memories are."""
    return {span.block.keys.device for bank in banks for layer in bank.layers for span in bank.spans(layer)}


def same(found, wanted, **tolerance):
    torch.testing.assert_close(found.cpu(), wanted, **(tolerance or CLOSE))


# ---- the pretended device ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here.T,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: here.add_(there),
        lambda here, there: torch.mul(there, 2, out=here),
        lambda here, there: here[0].sum().add_(there.sum()),
        lambda here, there: here[torch.zeros(1, dtype=torch.long, device=there.device)],
        lambda here, there: there.index_select(0, torch.zeros(1, dtype=torch.long)),
        lambda here, there: there.masked_fill(here > 0, 1),
        lambda here, there: torch.nn.functional.embedding(torch.zeros(1, dtype=torch.long), there),
        lambda here, there: torch.nn.functional.scaled_dot_product_attention(there[None], there[None], here[None]),
        lambda here, there: there + there.to("cuda:1"),
        lambda here, there: torch.equal(here, there),
        lambda here, there: there.numpy(),
    ],
)
def test_tensors_of_two_devices_dont_meet(pretended, mix):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|convert cuda:0 device type tensor to numpy"):
        mix(torch.ones(2, 3), torch.ones(2, 3, device="cuda:0"))


def test_what_cuda_takes_from_the_cpu(pretended):
    there = torch.arange(6.0, device="cuda:0").view(2, 3)
    assert (there + torch.tensor(1.0)).tolist() == [[1, 2, 3], [4, 5, 6]]
    assert there[torch.tensor([1])].tolist() == [[3, 4, 5]]
    there[torch.tensor([0])] = torch.tensor(9.0)
    assert there.masked_fill(there > 8, torch.tensor(0.0)).tolist() == [[0, 0, 0], [3, 4, 5]]
    there[:, 1].copy_(torch.tensor([7.0, 8.0]))
    here = torch.zeros(3)
    here.copy_(there[1])
    assert here.tolist() == [3, 8, 5]
    assert there.to("cuda").device == there.device
    assert there.to("cuda:1").device.index == 1
    assert pretended["copy_"] > 0


def test_values_views_and_writes_are_the_cpus(pretended):
    def work(device):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).float().to(device).view(2, 3, 4)
        view = x.transpose(1, 2)[:, ::2].unsqueeze(1)
        view *= 2
        view[1, 0, 1].fill_(5)
        x.as_strided((3,), (5,), 2).add_(0.5)
        x.view(-1).unfold(0, 4, 4)[:, 0].zero_()
        x.diagonal(dim1=1, dim2=2).neg_()
        x.requires_grad_(False).scatter_(2, torch.tensor([[[1]]], device=device), 9.0)
        small, at = x.flatten().topk(5)
        room = torch.empty(0, device=device)
        torch.cumsum(x, 1, out=room)
        x.detach().view(-1)[3:5] = torch.arange(2, device=device).to(x.dtype)
        x[x > 6] = -6
        packed = x.to(torch.bfloat16).view(torch.int16)
        found = [
            x,
            view.contiguous(),
            small,
            at,
            room,
            packed,
            x.softmax(-1),
            x.argsort(-1),
            (x > 0).nonzero(),
            x.var(1),
        ]
        found += [torch.empty(0, 3, device=device) @ x[0], torch.bincount(at), x.std().reshape(1), 7 % (at + 1)]
        return [*found, *x.split([1, 3], 2), *torch.unique(x, return_counts=True), x.expand(3, 2, 3, 4)[1]]

    for found, wanted in zip(work("cuda:0"), work("cpu"), strict=True):
        assert found.device == torch.device("cuda:0")
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0)


def test_nothing_is_left_of_the_pretended_device():
    if not can_pretend():
        pytest.skip("this torch has CUDA of its own")
    with pretended_cuda():
        kept = torch.ones(2, device="cuda:0")
        assert not torch.cuda.is_available()
        assert not torch.accelerator.is_available()
    for use in (lambda: torch.ones(2, device="cuda:0"), lambda: kept + 1, lambda: torch.ones(2).to("cuda:0")):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
            use()


# ---- memory here, model there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["exact", "pages", "faiss", "best tokens", "best tokens by faiss"])
@pytest.mark.parametrize("place", [None, "cpu"])
def test_memory_is_read_and_asked(make_model, ids, gpu, small, tmp_path, search, place):
    only = search.startswith("best")
    model = make_model(
        max_position_embeddings=64, last_context_length=16, mem_device=place, mem_top_k=2 if search == "pages" else 8,
        mem_search="faiss" if search.endswith("faiss") else "exact" if only else search, mem_top_k_attention=only,
    )  # fmt: skip
    document, questions = ids(270), ids(2, 10, seed=1)

    def work(device):
        memory = model.read(document)
        cache = model.memory_cache(memory)
        answers = model(questions.to(device), past_key_values=cache).logits
        texts = model.generate(questions.to(device), past_key_values=model.memory_cache(memory), **SHORT)
        return memory, cache, answers, texts

    memory, _, wanted, texts = work("cpu")
    memory.save(tmp_path / "memory")
    model.to(gpu)
    found = work(gpu)
    assert places(found[0], *found[1].memory) == {torch.device(place or gpu)}
    (search_cache,) = {tuple(span.block.search_cache) for span in found[0].spans(1)}
    assert len(search_cache) == {"exact": 0, "best tokens": 0, "pages": 3}.get(search, 1)
    for layer in memory.layers:
        same(found[0].keys(layer), memory.keys(layer))
        same(found[0].values(layer), memory.values(layer))
    same(found[2], wanted)
    assert found[3].tolist() == texts.tolist()
    # A file is mapped where it is, and may be taken over.
    mounted = MemoryBank.load(tmp_path / "memory", fingerprint=model.memory_fingerprint())
    for bank, there in ((mounted, torch.device("cpu")), (mounted.to(gpu), gpu)):
        assert places(bank) == {there}
        same(model(questions.to(gpu), past_key_values=model.memory_cache(bank)).logits, wanted)
    found[0].save(tmp_path / "other")
    same(MemoryBank.load(tmp_path / "other").keys(1), memory.keys(1))


@pytest.mark.parametrize("search", ["exact", "pages", "faiss"])
def test_one_memory_in_two_places(make_model, ids, gpu, small, tmp_path, search):
    model = make_model(mem_search=search, mem_top_k=2)
    first, second, question = ids(40), ids(30, seed=1), ids(1, 10, seed=2)
    model.read(first, segment="first").save(tmp_path / "memory")

    def work(device):
        memory = model.read(second, MemoryBank.load(tmp_path / "memory"), segment="second")
        return memory, model(question.to(device), past_key_values=model.memory_cache(memory)).logits

    wanted = work("cpu")
    model.to(gpu)
    memory, found = work(gpu)
    assert places(memory) == {torch.device("cpu"), gpu}
    same(found, wanted[1])
    same(memory.keys(2), wanted[0].keys(2))


@pytest.mark.parametrize(("overflow", "place"), [("slide", None), ("slide", "cpu"), ("flush", "cpu")])
def test_long_prompts_of_a_padded_batch(make_model, ids, gpu, place, overflow):
    """The prompts are several windows, and decoding goes on until the local context has overflowed."""
    model = make_model(mem_device=place, local_cache_overflow=overflow)
    lengths = (45, 3, 20)
    batch, mask = torch.zeros(3, 45, dtype=torch.long), torch.zeros(3, 45, dtype=torch.long)
    for row, length in enumerate(lengths):
        batch[row, -length:], mask[row, -length:] = ids(length, seed=length), 1
    longer = {**SHORT, "max_new_tokens": 12, "min_new_tokens": 12}
    settings = {**longer, "return_dict_in_generate": True, "output_scores": True}
    wanted = model.generate(batch, attention_mask=mask, **settings)
    model.to(gpu)
    found = model.generate(batch.to(gpu), attention_mask=mask.to(gpu), **settings)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    for scores, expected in zip(found.scores, wanted.scores, strict=True):
        same(scores, expected)
    assert places(*found.past_key_values.memory) == {torch.device(place or gpu)}


def test_many_tokens_that_push_out_others(make_model, ids, gpu):
    model, first, more = make_model(mem_device="cpu"), ids(2, 14), ids(2, 9, seed=1)

    def work(device):
        cache = model(first.to(device)).past_key_values
        return model(more.to(device), past_key_values=cache).logits

    wanted = work("cpu")
    model.to(gpu)
    same(work(gpu), wanted)


@pytest.mark.parametrize("place", [None, "cpu"])
def test_what_answers_attend_to(make_model, ids, gpu, place):
    model, document, question = make_model(mem_device=place), ids(40), ids(1, 10, seed=1)

    def work(device):
        memory = model.read(document)
        cache = model.memory_cache(memory)
        cache.observer = recorder = AttentionRecorder()
        model.generate(question.to(device), past_key_values=cache, **SHORT)
        scalings = dict.fromkeys(memory.layers, 8**-0.5)
        return recorder.mass(memory, memory.segments, scalings, baseline_tokens=2, question=8, answer=4)

    wanted = work("cpu")
    model.to(gpu)
    for found, expected in zip(work(gpu), wanted, strict=True):
        same(found, expected)


def test_compiled_decoding(make_model, ids, pretended):
    model = make_model(num_hidden_layers=1, mem_layers=[0], mem_device="cpu")
    prompt, more = ids(1, 24), ids(1, 2, seed=1)

    def work(device, forward):
        cache = model(prompt.to(device)).past_key_values
        return [forward(token[None, None], past_key_values=cache).logits for token in more[0].to(device)]

    wanted = work("cpu", model)
    model.to("cuda:0")
    for found, expected in zip(
        work("cuda:0", torch.compile(model, backend="eager", dynamic=True)), wanted, strict=True
    ):
        same(found, expected)


def test_beams(make_model, ids, gpu):
    model, prompt = make_model(mem_device="cpu"), ids(1, 30)
    wanted = model.generate(prompt, num_beams=3, **SHORT)
    assert model.to(gpu).generate(prompt.to(gpu), num_beams=3, **SHORT).tolist() == wanted.tolist()


def test_plain_steps_where_gradients_are_wanted(make_model, ids, gpu):
    model, prompt = make_model(mem_device="cpu"), ids(2, 45)
    with torch.enable_grad():
        wanted = model(prompt, labels=prompt)
        found = model.to(gpu)(prompt.to(gpu), labels=prompt.to(gpu))
    same(found.logits.detach(), wanted.logits.detach())
    same(found.loss.detach(), wanted.loss.detach())


def test_rows_that_see_one_another(make_model, ids, gpu):
    model, rows = make_model(), ids(3, 16)
    settings = {"contexts": [[1], [0, 2], []]}
    wanted = model(rows, labels=rows, **settings).loss
    same(model.to(gpu)(rows.to(gpu), labels=rows.to(gpu), **settings).loss, wanted)


def test_half_precision(make_model, ids, gpu):
    """What bfloat16 costs there is what it costs here."""
    model, question = make_model(mem_device="cpu", mem_dtype="bfloat16"), ids(2, 40)
    exactly = model(question).logits
    error = (model.bfloat16()(question).logits - exactly).abs()
    found = model.to(gpu)(question.to(gpu))
    assert places(*found.past_key_values.memory) == {torch.device("cpu")}
    assert (found.logits.cpu() - exactly).abs().mean() < 1.25 * error.mean()


# ---- adapters and placed layers ------------------------------------------------------------------------------------


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    modules = ["q_proj", "k_proj", "v_proj"]
    return get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)).eval()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_adapter(make_model, ids, gpu, kind):
    model = make_model(mem_device="cpu")
    with_adapter = adapted(model).to(kind)
    document, question = ids(40), ids(1, 10, seed=1)

    def work(device):
        cache = model.memory_cache(model.read(document))
        return with_adapter(input_ids=question.to(device), past_key_values=cache).logits.float()

    wanted, fingerprint = work("cpu"), model.memory_fingerprint()
    with_adapter.to(gpu)
    loose = {"atol": 0.1, "rtol": 0.02}
    same(work(gpu), wanted, **(CLOSE if kind == torch.float32 else loose))
    assert model.memory_fingerprint() == fingerprint


@pytest.fixture
def place_model(pretended, tmp_path):
    """Loads a model whose parts are placed: the embedding, three layers, and the head."""

    def load(model, embedding, *layers, head="cuda:0", **settings):
        model.save_pretrained(tmp_path / "model")
        parts = {"model.embed_tokens": embedding, "model.rotary_emb": "cuda:0", "model.norm": head, "lm_head": head}
        parts |= {f"model.layers.{number}": place for number, place in enumerate(layers)}
        # It asks a real GPU for room.
        with mock.patch("transformers.modeling_utils.caching_allocator_warmup"):
            return LongLlamaForCausalLM.from_pretrained(tmp_path / "model", device_map=parts, **settings), parts

    return load


@pytest.mark.parametrize("place", [None, "cpu"])
@pytest.mark.parametrize(
    "placed",
    [
        ("cuda:0", "cuda:0", "cuda:1", "cuda:1"),
        ("cuda:0", "cuda:0", "cuda:1", "cpu"),
        ("cpu", "cpu", "cuda:0", "cuda:0"),
    ],
)
def test_layers_in_several_places(make_model, ids, place_model, place, placed):
    """Those on the CPU are offloaded: accelerate brings their weights to a GPU when they are needed."""
    model = make_model()
    prompt, document, question = ids(1, 45), ids(40), ids(1, 10, seed=1)
    wanted = model(prompt).logits, model(question, past_key_values=model.memory_cache(model.read(document))).logits
    loaded, _ = place_model(model, *placed, head=placed[2], mem_device=place)
    assert loaded.device == torch.device("cuda:0")
    memory = loaded.read(document)
    assert memory.fingerprint == model.memory_fingerprint()
    if place or "cpu" not in placed:
        assert places(memory) == {torch.device(place or device) for device in placed[2:]}
    same(loaded(prompt.to("cuda:0")).logits, wanted[0])
    same(loaded(question.to("cuda:0"), past_key_values=loaded.memory_cache(memory)).logits, wanted[1])


def test_an_adapter_of_offloaded_layers(make_model, ids, place_model, tmp_path):
    from peft import PeftModel

    model, document, question = make_model(), ids(40), ids(1, 10, seed=1)
    loaded, parts = place_model(model, "cuda:0", "cuda:0", "cuda:0", "cpu")
    with_adapter = adapted(model)
    with_adapter.save_pretrained(tmp_path / "adapter")
    wanted = with_adapter(input_ids=question, past_key_values=model.memory_cache(model.read(document))).logits
    parts = {f"base_model.model.{name}": place for name, place in parts.items()}
    placed = PeftModel.from_pretrained(loaded, tmp_path / "adapter", device_map=parts).eval()
    assert {parameter.device.type for parameter in placed.parameters()} == {"cuda", "meta"}
    for _ in range(2):
        memory = loaded.read(document)
        assert memory.fingerprint == model.memory_fingerprint()
        cache = loaded.memory_cache(memory)
        same(placed(input_ids=question.to("cuda:0"), past_key_values=cache).logits, wanted)


# ---- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stand_in", [cuda_kernels.efficient_attention, cuda_kernels.efficient_attention_backward])
def test_stand_ins_have_the_kernels_signature(stand_in):
    name = EFFICIENT + ("_backward" if stand_in.__name__.endswith("backward") else "")
    schema = getattr(torch.ops.aten, name).default._schema
    parameters = inspect.signature(stand_in).parameters.values()
    assert [one.kind == inspect.Parameter.KEYWORD_ONLY for one in parameters] == [
        one.kwarg_only for one in schema.arguments
    ]
    for parameter, argument in zip(parameters, schema.arguments, strict=True):
        assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty)
    if "backward" not in name:
        assert [one.name for one in schema.returns] == ["output", "log_sumexp", "philox_seed", "philox_offset"]


def drawn(*shape, kind=torch.float32, seed=0):
    """Numbers, laid out as a model's projections are: (batch, heads, tokens, head_dim) of (batch, tokens, …)."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, head_dim, generator=generator).to(kind).transpose(1, 2)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", ["", "causal", "bool", "bool per row", "added"])
@pytest.mark.parametrize("head_dim", [8, 4])
def test_the_forward_kernel(gpu, calls, kind, masked, head_dim):
    query, key, value = (drawn(2, heads, 35, head_dim, seed=heads + each) for each, heads in enumerate((4, 2, 2)))
    query, key, value = query.to(kind).float(), key.to(kind), value.to(kind)
    seen = torch.rand(2, 1, 35, 35, generator=torch.Generator().manual_seed(3)) > 0.5
    seen[1, :, 4] = False
    seen = {"": torch.ones(35, 35), "causal": torch.ones(35, 35).tril(), "bool": seen[1, 0]}.get(masked, seen).bool()
    mask = {"bool": seen, "bool per row": seen, "added": seen.float().log()}.get(masked)

    keys, values = (one.float().repeat_interleave(2, 1) for one in (key, value))
    scores = (query @ keys.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    # In another layout than the kernel takes.
    given = [query, key.transpose(2, 3).contiguous().transpose(2, 3), value]
    output, lse = flash(
        *(one.to(gpu) for one in given),
        scaling=0.3,
        causal=masked == "causal",
        mask=None if mask is None else mask.to(gpu),
    )
    assert output.dtype == lse.dtype == torch.float32
    same(lse, scores.logsumexp(-1))
    wanted = scores.softmax(-1).nan_to_num(0) @ values
    # Where there is a kernel, its output is of the memory's type.
    same(output, wanted, **(CLOSE if kind == torch.float32 or head_dim == 4 else {"atol": 0.01, "rtol": 0.01}))
    assert calls is None or calls[EFFICIENT] == (head_dim == 8)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_backward_kernel(gpu, calls, kind, causal, kv_heads):
    query, key, value = drawn(2, 4, 35, 8), drawn(2, kv_heads, 35, 8, seed=1), drawn(2, kv_heads, 35, 8, seed=2)
    query, key, value, grad = (one.to(kind) for one in (query, key, value, drawn(2, 4, 35, 8, seed=3)))
    output, lse = flash(query.float(), key.float(), value.float(), scaling=0.3, causal=causal)
    wide = AttentionPart(query.float(), key.float(), value.float(), causal)
    wanted = attend_part_backward(grad.float(), wide, output, lse, 0.3)
    # As a gradient comes from a sum, and the output from a merge: in other layouts than the kernel's own.
    there = AttentionPart(*(one.to(gpu) for one in (query, key, value)), causal)
    grad = grad.to(gpu).transpose(2, 3).contiguous().transpose(2, 3)
    found = attend_part_backward(grad, there, output.to(kind).to(gpu).contiguous(), lse.to(gpu), 0.3)
    for one, expected in zip(found, wanted, strict=True):
        assert one.dtype == kind
        same(one.float(), expected, **(CLOSE if kind == torch.float32 else {"atol": 0.06, "rtol": 0.02}))
    assert calls is None or calls[f"{EFFICIENT}_backward"] == (2 if causal and kv_heads == 2 else 1)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_cross_batch_attention_and_its_gradients(gpu, calls, kind, apart):
    """The function's two passes, called as autograd calls them."""
    rows, lengths = [[1], [0, 2], []], (20, 14, 20)
    plan = crossbatch.plan_contexts(rows, 3, lengths)
    tensors = [drawn(3, 2 if each % 3 else 4, 20, 8, seed=each).to(kind) for each in range(6)]
    if not apart:
        tensors[3] = tensors[0]
    grad, grad_found = drawn(3, 4, 20, 8, seed=9).to(kind), drawn(3, 4, 20, 8, seed=10).to(kind)

    def work(device, wide):
        context = SimpleNamespace(save_for_backward=lambda *saved: setattr(context, "saved_tensors", saved))
        given = [one.to(device=device, dtype=wide) for one in tensors]
        outputs = crossbatch._CrossBatch.forward(context, *given, plan, 0.3, apart)
        grads = (grad.to(device=device, dtype=wide), grad_found.to(device=device, dtype=wide) if apart else None)
        found = [*outputs, *crossbatch._CrossBatch.backward(context, *grads)[:6]]
        return [each for each in found if each is not None]

    for found, wanted in zip(work(gpu, kind), work("cpu", torch.float32), strict=True):
        assert found.device == gpu
        same(found.float(), wanted, **(CLOSE if kind == torch.float32 else {"atol": 0.1, "rtol": 0.05}))
    assert calls is None or calls[f"{EFFICIENT}_backward"] > 2
