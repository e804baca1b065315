"""Whitening of slot embeddings, so that cosines measure similarity: y = M (x - c), then normalized.

A few directions dominate cosines of hidden states (Ethayarajh 2019, arXiv:1909.00512). Whitening (Su et al. 2021,
arXiv:2103.15316) removes them; here queries and documents have a centre each, and M = (C + SHRINKAGE mean(C))^(-POWER /
2), with the covariance C, is a partial inverse root that doesn't amplify the noise of small directions.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamory.common.io import atomic_path
from llamory.errors import LlamoryError
from llamory.llara.template import QUERY_PROMPTS

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.router import Router

WHITENING_FILE = "whitening.safetensors"
POWER = 0.75  # of the inverse root; 1 whitens completely
SHRINKAGE = 0.1  # share of the mean variance that is added to each direction's variance
QUERY_WORDS = (4, 14)  # least and most words of a pseudo-query
MIN_TEXTS = 16  # fewer give no useful mean and covariance

_ROUTES = ("document", *(f"{prompt}_query" for prompt in QUERY_PROMPTS))


@dataclass(frozen=True, eq=False)
class Whitening:
    """A centre that is subtracted from normalized embeddings, and a matrix that they are multiplied by.

    Attributes:
        matrix: (dimension, dimension), symmetric.
        centres: (dimension,) each, of "document" and of each query prompt, such as "summary_query".
    """

    matrix: Tensor
    centres: Mapping[str, Tensor]

    def modules(self, query_prompt: str) -> list[Any]:
        """Stock modules of Sentence Transformers that apply it, to be appended to those of an embedder."""
        from sentence_transformers.base.modules import Router
        from sentence_transformers.base.modules.dense import Dense
        from sentence_transformers.base.modules.normalize import Normalize

        routes: dict[str, list[Any]] = {}
        for name, centre in self.centres.items():
            matrix, identity = self.matrix.float(), torch.nn.Identity()
            bias = -matrix @ centre.float()
            routes[name] = [Dense(*matrix.shape, activation_function=identity, init_weight=matrix, init_bias=bias)]
        return [Router(routes, default_route="document", route_mappings=route_mappings(query_prompt)), Normalize()]  # type: ignore[arg-type]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write it into a checkpoint's folder, the matrix in `dtype`."""
        from safetensors.torch import save_file

        tensors = {f"{name}_centre": centre.contiguous() for name, centre in self.centres.items()}
        tensors["matrix"] = self.matrix.to(dtype).contiguous()
        with atomic_path(folder / WHITENING_FILE) as temporary:
            save_file(tensors, temporary)

    @classmethod
    def load(cls, folder: Path, dimension: int) -> Whitening | None:
        """Read the whitening in a checkpoint's folder; None if there is none, a LlamoryError if it doesn't fit."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = folder / WHITENING_FILE
        if not file.is_file():
            return None
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise LlamoryError(f"{file} can't be read: {error}; fit it again, or remove it.") from error
        shapes: dict[str, tuple[int, ...]] = {f"{name}_centre": (dimension,) for name in _ROUTES}
        for name, shape in (shapes | {"matrix": (dimension, dimension)}).items():
            if name not in tensors or tensors[name].shape != shape or not tensors[name].isfinite().all():
                problem = f"its {name} doesn't fit the model beside it, of {dimension} dimensions"
                raise LlamoryError(f"{file} was made for another model: {problem}; fit it again, or remove it.")
        return cls(tensors["matrix"], {name: tensors[f"{name}_centre"] for name in _ROUTES})


def fit_whitening(documents: Tensor, queries: Mapping[str, Tensor]) -> Whitening:
    """Fit whitening to normalized embeddings, in float64.

    Args:
        documents: (texts, dimension)
        queries: (texts, dimension) of short texts, by query prompt.

    Raises LlamoryError if there are too few texts.
    """
    parts = {"document": documents.double()} | {f"{name}_query": part.double() for name, part in queries.items()}
    if (smallest := min(map(len, parts.values()))) < MIN_TEXTS:
        raise LlamoryError(f"Whitening needs at least {MIN_TEXTS} texts, not {smallest}; add data, or set whiten to 0.")
    # All parts have the same weight, whatever their number of texts.
    covariances = [torch.cov(part.T, correction=0) for part in parts.values()]
    values, directions = torch.linalg.eigh(torch.stack(covariances).mean(0))
    scales = (values.clamp(min=0) + SHRINKAGE * values.mean()).pow(-POWER / 2)
    matrix = directions @ (scales[:, None] * directions.T)
    matrix = (matrix / matrix.diagonal().mean()).float()  # cosines ignore the scale; this one suits bfloat16
    return Whitening(matrix, {name: part.mean(0).float() for name, part in parts.items()})


def pseudo_queries(texts: Sequence[str], seed: int = 0) -> list[str]:
    """The first few words of each text, as many as a query has."""
    rng = random.Random(seed)
    return [" ".join(text.split()[: rng.randint(*QUERY_WORDS)]) for text in texts]


def whitening_router(embedder: SentenceTransformer) -> Router | None:
    """The router of `Whitening.modules` in an embedder; None if it has no whitening."""
    from sentence_transformers.base.modules import Router

    return next((module for module in list(embedder)[1:] if isinstance(module, Router)), None)


def route_mappings(query_prompt: str) -> dict[Any, str]:
    """The mappings of `whitening_router` by which queries use the centre of a query prompt."""
    return {("query", None): f"{query_prompt}_query", ("document", None): "document"}
