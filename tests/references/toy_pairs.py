"""Training pairs that a tiny model can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "river stone bridge winter garden letter window market silver morning harbour candle forest summer".split()


def write_pairs(file: Path, count: int, *, scored: bool = False, seed: int = 0) -> Path:
    """Queries of three words; the answer has the words in another order among others, negatives have others."""
    chance, lines = random.Random(seed), []
    for number in range(count):
        words = chance.sample(WORDS, 3)
        others = [word for word in WORDS if word not in words]
        answer = words + chance.sample(others, 2)
        chance.shuffle(answer)
        entry = {"query": f"{' '.join(words)} {number}", "pos": [f"{' '.join(answer)} {number}"]}
        entry["neg"] = [f"{' '.join(chance.sample(others, 5))} {i} of {number}" for i in range(3)]
        if scored:
            entry |= {"pos_scores": [1.0], "neg_scores": [0.3, 0.2, 0.1]}
        lines.append(json.dumps(entry) + "\n")
    file.write_text("".join(lines))
    return file
