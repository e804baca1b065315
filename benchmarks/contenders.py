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
from published_way import Kept, PublishedWay

WAYS = {
    "published": "(a) published, its default (eager)",
    "published-sdpa": "(a) published, its SDPA variant",
    "exact": "(b) llamory, exact",
    "pages": "(c) llamory, pages",
    "stock": "(d) stock LLaMA, full cache",
}
SAMPLE_TOKENS = 2048
DRAWN_AT_ONCE = 16384


@dataclass(frozen=True)
class Case:
    """A model that all ways run.

    Attributes:
        name: what it is called.
        context: tokens of a window.
        mem_layers: the memory layers; None for the model's own.
        real: whether it is the packaged base model, or one with random weights.
    """

    name: str
    context: int
    mem_layers: tuple[int, ...] | None
    real: bool

    @property
    def last(self) -> int:
        """Tokens of the last window, and of the local context when decoding starts: it must not overflow."""
        return self.context // 2

    def long_model(self, search: str = "exact") -> LongLlamaForCausalLM:
        """The model as a LongLLaMA."""
        if self.real:
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
        if self.real:
            model = load_model("default", LlamaForCausalLM, dtype=torch.float32)
            assert isinstance(model, LlamaForCausalLM)
            return model.eval()
        long = self.long_model()
        config = {key: value for key, value in long.config.to_dict().items() if key in LlamaConfig().to_dict()}
        model = LlamaForCausalLM(LlamaConfig(**config | {"model_type": "llama"}))
        model.load_state_dict(long.state_dict())
        return model.eval()

    def ids(self, count: int, seed: int = 0) -> Tensor:
        """Tokens (1, count): real text for the real model, random ones for the random model."""
        if not self.real:
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
class Likeness:
    """Means and spreads of a model's keys and values, to draw others like them.

    Attributes:
        layers: per memory layer, for keys and for values: means (kv_heads, 1, head_dim) and the Cholesky factors of
            the covariances (kv_heads, head_dim, head_dim).
    """

    layers: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

    @classmethod
    def measure(cls, case: Case, path: Path) -> dict[str, Any]:
        """Read some tokens and write the likeness of what memory then holds to a file."""
        model = case.long_model()
        bank = model.read(case.ids(SAMPLE_TOKENS)[0])
        layers = {layer: (_moments(bank.keys(layer)), _moments(bank.values(layer))) for layer in bank.layers}
        torch.save(layers, path)
        return {"tokens": SAMPLE_TOKENS}

    @classmethod
    def load(cls, path: Path) -> Likeness:
        """What `measure` wrote."""
        return cls(torch.load(path))

    def draw(self, layer: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values, (kv_heads, some tokens, head_dim), until there are `tokens` in all."""
        generator = torch.Generator().manual_seed(layer)
        for start in range(0, tokens, DRAWN_AT_ONCE):
            parts = []
            for mean, factor in self.layers[layer]:
                shape = (len(mean), min(DRAWN_AT_ONCE, tokens - start), mean.shape[-1])
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


class Contender(Protocol):
    """One way of reading with memory."""

    def read(self, ids: Tensor) -> Tensor:
        """Read a prompt (1, length) from the start. Gives the logits of its last token."""

    def fill(self, likeness: Likeness, tokens: int) -> None:
        """Put so many tokens into memory without reading them."""

    def step(self, ids: Tensor) -> Tensor:
        """Go on with one token (1, 1). Gives its logits."""


class Published:
    """(a) The published way."""

    def __init__(self, case: Case, sdpa: bool):
        model = case.long_model()
        layers = list(model.config.mem_layers or ())
        self.way = PublishedWay(model, mem_layers=layers, context=case.context, last=case.last, sdpa=sdpa)
        self.hidden: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.hidden = None
        self.way.memory, self.way.local = {}, {}
        self.hidden = self.way.read(ids)
        return self.way.head(self.hidden[:, -1:])

    def all_logits(self) -> Tensor:
        """Logits of the whole prompt, which the published code computes although only the last are used."""
        assert self.hidden is not None
        return self.way.head(self.hidden)

    def fill(self, likeness: Likeness, tokens: int) -> None:
        for layer, moments in likeness.layers.items():
            kept = [torch.empty(1, len(mean), tokens, mean.shape[-1], dtype=torch.bfloat16) for mean, _ in moments]
            for start, drawn in zip(range(0, tokens, DRAWN_AT_ONCE), likeness.draw(layer, tokens), strict=True):
                for whole, part in zip(kept, drawn, strict=True):
                    whole[0, :, start : start + DRAWN_AT_ONCE] = part
            self.way.memory[layer] = Kept(kept[0], kept[1], torch.zeros(1, 1, tokens, 1))

    def step(self, ids: Tensor) -> Tensor:
        return self.way.step(ids)


class Ours:
    """(b) and (c) llamory."""

    def __init__(self, case: Case, search: str):
        self.model = case.long_model(search)
        self.cache: LongLlamaCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = LongLlamaCache(self.model.config, [self.model.model.new_memory()])
        return self._forward(ids)

    def fill(self, likeness: Likeness, tokens: int) -> None:
        assert self.cache is not None
        for layer in likeness.layers:
            for keys, values in likeness.draw(layer, tokens):
                self.cache.memory[0].append(layer, keys, values)

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


class Stock:
    """(d) A plain LLaMA that keeps all keys and values of all layers and sees them all."""

    def __init__(self, case: Case):
        self.model = case.stock_model()
        self.cache: DynamicCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(ids)

    def fill(self, likeness: Likeness, tokens: int) -> None:
        assert self.cache is not None
        # Its layers all have a cache; only the number of tokens matters here, so they may all be like one.
        drawn = list(zip(*likeness.draw(next(iter(likeness.layers)), tokens), strict=True))
        for cached in self.cache.layers:
            cached.keys, cached.values = (
                torch.cat([own, *(part[None] for part in parts)], 2)
                for own, parts in zip((cached.keys, cached.values), drawn, strict=True)
            )

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


def make(case: Case, way: str) -> Contender:
    """A contender, one of `WAYS`."""
    if way.startswith("published"):
        return Published(case, sdpa=way == "published-sdpa")
    return Stock(case) if way == "stock" else Ours(case, way)
