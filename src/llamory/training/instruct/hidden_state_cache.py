"""What a frozen model's memory layers are given of rows that are read by themselves, kept from step to step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BATCH_ROWS = 16  # rows that are read together


class HiddenStateCache:
    """Reads rows, and keeps what it read.

    Args:
        rows: how many are kept, those that were wanted last; each takes width * hidden * memory layers * the type's
            bytes.
    """

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, model: Any, input_ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """Per memory layer (rows, width, hidden), as `layer_inputs` gives them.

        Args:
            model: a LongLlamaModel, whose weights must not change but for memory's projections.
            input_ids: (rows, width), padded on the right.
            lengths: real tokens of each row; what is behind them means nothing.
        """
        layers = sorted(model.config.mem_layers)
        names = [row[:length].cpu().numpy().tobytes() for row, length in zip(input_ids, lengths, strict=True)]
        found = {name: self._cache[name] for name in names if name in self._cache}
        new = list({name: at for at, name in enumerate(names) if name not in found}.values())
        for start in range(0, len(new), BATCH_ROWS):
            rows = new[start : start + BATCH_ROWS]
            width = max(lengths[row] for row in rows)
            states = model.layer_inputs(input_ids[rows, :width])
            for index, row in enumerate(rows):
                state = torch.stack([states[layer][index, : lengths[row]] for layer in layers])
                found[names[row]] = state.to(_cache_dtype(state))
        self._store(found)
        output = next(iter(found.values())).new_zeros(len(layers), *input_ids.shape, model.config.hidden_size)
        for row, name in enumerate(names):
            output[:, row, : lengths[row]] = found[name]
        return dict(zip(layers, output, strict=True))

    def _store(self, found: dict[bytes, Tensor]) -> None:
        for name, state in found.items():
            self._cache[name] = state
            self._cache.move_to_end(name)
        while len(self._cache) > self.rows:
            self._cache.popitem(last=False)


def _cache_dtype(state: Tensor) -> torch.dtype:
    """The short type of autocast, which projections round to anyway."""
    device = state.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype
