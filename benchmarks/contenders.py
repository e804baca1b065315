"""The ways of reading with memory that `memory_attention.py` compares, all on the same weights."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llamory.longllama import LongLlamaCache, LongLlamaConfig, LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.models.base import load_model, load_tokenizer
from published_way import CachedKeysValues, ReferenceLongLlama

METHODS = {
    "published": "(a) published, its default (eager)",
    "published-sdpa": "(a) published, its SDPA variant",
    "exact": "(b) llamory, exact",
    "pages": "(c) llamory, pages",
    "stock": "(d) stock LLaMA, full cache",
}
SAMPLE_TOKENS = 2048
SAMPLE_CHUNK_TOKENS = 16384


@dataclass(frozen=True)
class Case:
    """A model that all ways run.

    Attributes:
        name: what it is called.
        context: tokens of a window.
        mem_layers: the memory layers; None for the model's existing.
        pretrained: whether it is the packaged base model, or one with random weights.
    """

    name: str
    context: int
    mem_layers: tuple[int, ...] | None
    pretrained: bool

    @property
    def last(self) -> int:
        """Tokens of the last window, and of the local context when decoding starts: it must not overflow."""
        return self.context // 2

    def long_model(self, search: str = "exact") -> LongLlamaForCausalLM:
        """The model as a LongLLaMA."""
        if self.pretrained:
            model = load_long_model(
                "base",
                mem_layers=self.mem_layers,
                context_length=self.context,
                last_context_length=self.last,
                mem_search=search,
                dtype=torch.float32,
            )
            return model.eval()
        torch.manual_seed(0)
        config = LongLlamaConfig(
            vocab_size=32000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=self.context,
            last_context_length=self.last,
            mem_layers=list(self.mem_layers or ()),
            mem_search=search,
        )
        return LongLlamaForCausalLM(config).eval()

    def stock_model(self) -> LlamaForCausalLM:
        """The same weights as a plain LLaMA."""
        if self.pretrained:
            model = load_model("default", LlamaForCausalLM, dtype=torch.float32)
            assert isinstance(model, LlamaForCausalLM)
            return model.eval()
        long = self.long_model()
        config = {key: value for key, value in long.config.to_dict().items() if key in LlamaConfig().to_dict()}
        model = LlamaForCausalLM(LlamaConfig(**config | {"model_type": "llama"}))
        model.load_state_dict(long.state_dict())
        return model.eval()

    def ids(self, count: int, seed: int = 0) -> Tensor:
        """Tokens (1, count): pretrained text for the pretrained model, random ones for the random model."""
        if not self.pretrained:
            return torch.randint(3, 32000, (1, count), generator=torch.Generator().manual_seed(seed))
        text = library_text(9 * count + 100_000 * seed)[100_000 * seed :]
        ids = torch.tensor(load_tokenizer("default")(text, verbose=False)["input_ids"])
        # The library has some megabytes of text; longer prompts go round.
        return ids.repeat(-(-count // len(ids)))[None, :count]


def library_text(characters: int) -> str:
    """The first so many characters of the Python standard library's source, file after file."""
    parts, total = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(file.read_text(errors="ignore"))
        total += len(parts[-1])
        if total >= characters:
            break
    return "\n\n".join(parts)[:characters]


@dataclass(frozen=True)
class KeyValueStatistics:
    """Means and spreads of a model's keys and values, to sample others like them.

    Attributes:
        layers: per memory layer, for keys and for values: means (kv_heads, 1, head_dim) and the Cholesky factors of
            the covariances (kv_heads, head_dim, head_dim).
    """

    layers: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

    @classmethod
    def measure(cls, case: Case, path: Path) -> dict[str, Any]:
        """Read some tokens and write the statistics of what memory then holds to a file."""
        model = case.long_model()
        bank = model.read(case.ids(SAMPLE_TOKENS)[0])
        layers = {layer: (_moments(bank.keys(layer)), _moments(bank.values(layer))) for layer in bank.layers}
        torch.save(layers, path)
        return {"tokens": SAMPLE_TOKENS}

    @classmethod
    def load(cls, path: Path) -> KeyValueStatistics:
        """What `measure` wrote."""
        return cls(torch.load(path))

    def sample(self, layer: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values, (kv_heads, some tokens, head_dim), until there are `tokens` in all."""
        generator = torch.Generator().manual_seed(layer)
        for start in range(0, tokens, SAMPLE_CHUNK_TOKENS):
            parts = []
            for mean, factor in self.layers[layer]:
                shape = (len(mean), min(SAMPLE_CHUNK_TOKENS, tokens - start), mean.shape[-1])
                noise = torch.randn(shape, generator=generator)
                parts.append(torch.baddbmm(mean, noise, factor.transpose(1, 2)))
            yield parts[0], parts[1]


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    mean = tensor.mean(1, keepdim=True)
    centred = (tensor - mean).double()
    covariance = centred.transpose(1, 2) @ centred / tensor.shape[1]
    ridge = 1e-6 * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(tensor.shape[2], dtype=torch.double))
    return mean, factor.float()


class Method(Protocol):
    """One method of reading with memory."""

    def read(self, ids: Tensor) -> Tensor:
        """Read a prompt (1, length) from the start. Gives the logits of its last token."""

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        """Put so many tokens into memory without reading them."""

    def step(self, ids: Tensor) -> Tensor:
        """Go on with one token (1, 1). Gives its logits."""


class PublishedMethod:
    """(a) The published method."""

    def __init__(self, case: Case, sdpa: bool):
        model = case.long_model()
        layers = list(model.config.mem_layers or ())
        self.method = ReferenceLongLlama(model, mem_layers=layers, context=case.context, last=case.last, sdpa=sdpa)
        self.hidden: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.hidden = None
        self.method.memory, self.method.local = {}, {}
        self.hidden = self.method.read(ids)
        return self.method.head(self.hidden[:, -1:])

    def all_logits(self) -> Tensor:
        """Logits of the buffer prompt, which the published code computes although only the last are used."""
        assert self.hidden is not None
        return self.method.head(self.hidden)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        for layer, moments in statistics.layers.items():
            buffers = [torch.empty(1, len(mean), tokens, mean.shape[-1], dtype=torch.bfloat16) for mean, _ in moments]
            for start, sampled in zip(
                range(0, tokens, SAMPLE_CHUNK_TOKENS), statistics.sample(layer, tokens), strict=True
            ):
                for buffer, part in zip(buffers, sampled, strict=True):
                    buffer[0, :, start : start + SAMPLE_CHUNK_TOKENS] = part
            self.method.memory[layer] = CachedKeysValues(buffers[0], buffers[1], torch.zeros(1, 1, tokens, 1))

    def step(self, ids: Tensor) -> Tensor:
        return self.method.step(ids)


class LlamoryMethod:
    """(b) and (c) llamory."""

    def __init__(self, case: Case, search: str):
        self.model = case.long_model(search)
        self.cache: LongLlamaCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = LongLlamaCache(self.model.config, [self.model.model.new_memory()])
        return self._forward(ids)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        assert self.cache is not None
        for layer in statistics.layers:
            for keys, values in statistics.sample(layer, tokens):
                self.cache.memory[0].append(layer, keys, values)

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


class BaselineMethod:
    """(d) A plain LLaMA that keeps all keys and values of all layers and sees them all."""

    def __init__(self, case: Case):
        self.model = case.stock_model()
        self.cache: DynamicCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(ids)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        assert self.cache is not None
        # Its layers all have a cache; only the number of tokens matters here, so they may all be like one.
        sampled = list(zip(*statistics.sample(next(iter(statistics.layers)), tokens), strict=True))
        for cached in self.cache.layers:
            cached.keys, cached.values = (
                torch.cat([existing, *(part[None] for part in parts)], 2)
                for existing, parts in zip((cached.keys, cached.values), sampled, strict=True)
            )

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


def make(case: Case, method: str) -> Method:
    """A contender, one of `METHODS`."""
    if method.startswith("published"):
        return PublishedMethod(case, sdpa=method == "published-sdpa")
    return BaselineMethod(case) if method == "stock" else LlamoryMethod(case, method)
