"""Documents of a library as they are read into memory: the passages joined, each token known to be of one of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from llamory.documents import Chunk
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class StoredDocument:
    """A document as a library holds it.

    Attributes:
        source: its source.
        passages: at least one, in order.
    """

    source: str
    passages: tuple[Chunk, ...]

    @property
    def title(self) -> str:
        """The title that it begins with."""
        return self.passages[0].title

    @property
    def chunk_texts(self) -> list[str]:
        """What is read of each passage; joined they are the text. The title goes first if the text lacks it."""
        texts = [passage.text for passage in self.passages]
        if self.title and self.title not in texts[0].split("\n", 1)[0]:
            texts[0] = f"{self.title}{_SEPARATOR}{texts[0]}"
        return [f"{text}{_SEPARATOR}" for text in texts[:-1]] + texts[-1:]

    @cached_property
    def digest(self) -> str:
        """A hash of all that is read."""
        return hashlib.sha256(json.dumps(self.chunk_texts).encode()).hexdigest()[:32]

    def key(self, reader: str) -> str:
        """What its memory is filed under.

        Args:
            reader: all that tells one reader's memories from another's.
        """
        return hashlib.sha256(f"{self.digest} {reader}".encode()).hexdigest()[:32]


@dataclass(frozen=True, eq=False)
class DocumentTokens:
    """A document's tokens.

    Attributes:
        ids: (tokens,) int32.
        starts: the first token of each passage; what is before the first one (a mark that all texts begin with)
            belongs to none.
    """

    ids: Tensor
    starts: list[int]


def tokenize_document(
    document: StoredDocument, tokenizer: PreTrainedTokenizerBase, prefix_ids: Sequence[int]
) -> DocumentTokens:
    """A document's tokens and whose they are.

    Args:
        document: the document.
        tokenizer: the reader's; a fast one.
        prefix_ids: tokens that it puts before each text.

    Raises:
        LlamoryError: the tokenizer isn't a fast one.
    """
    import torch

    if not tokenizer.is_fast:
        raise LlamoryError("Memory of a library needs a fast tokenizer; use a reader that has a tokenizer.json.")
    chunk_texts = document.chunk_texts
    # A document that spells out a special token, such as the end of a chat's turn, doesn't get to use it.
    encoded = tokenizer(
        "".join(chunk_texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    offsets = torch.tensor([end for _, end in encoded["offset_mapping"]], dtype=torch.int64)
    offset, boundaries = 0, []
    for text in chunk_texts:
        boundaries.append(offset)
        offset += len(text)
    # The first token that ends behind a passage's beginning is its first: a token over an edge is the later one's.
    starts = torch.searchsorted(offsets, torch.tensor(boundaries, dtype=torch.int64), right=True) + len(prefix_ids)
    ids = torch.tensor([*prefix_ids, *encoded["input_ids"]], dtype=torch.int32)
    return DocumentTokens(ids, starts.tolist())
