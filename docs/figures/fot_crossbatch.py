"""Draws which rows of a batch each row sees in FoT training, from the function that training uses.

python docs/figures/fot_crossbatch.py        writes docs/figures/fot_crossbatch.svg
"""

from __future__ import annotations

from pathlib import Path

from llamory.training.fot.contexts import ContextSampler, ContextSamplingConfig

BATCH, PACKING, SCHEDULE = 12, 3, [(0, 0), (1, 1), (2, 1), (2, 2)]
CELL, LEFT, TOP = 40, 250, 96
OWN, POSITIVE, NEGATIVE, EMPTY = "#c8553d", "#8fb996", "#4c8bb8", "#f4f4f4"


def draw() -> str:
    """The picture as SVG."""
    context_sampler = ContextSampler(
        ContextSamplingConfig(crossbatch_schedule=SCHEDULE), batch_size=BATCH, dataset_packing=PACKING, seed=3
    )
    contexts = context_sampler.select(step=0)
    width, height = LEFT + BATCH * CELL + 360, TOP + BATCH * CELL + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-weight="bold">which rows of the batch (columns) each row sees in a memory layer'
        "</text>",
        f'<text x="{LEFT}" y="38" fill="#444">{BATCH // PACKING} documents of {PACKING} chunks each; one in each '
        "quarter of the batch</text>",
    ]
    for row in range(BATCH):
        document, chunk = divmod(row, PACKING)
        y = TOP + row * CELL
        positives, negatives = SCHEDULE[document * len(SCHEDULE) // (BATCH // PACKING)]
        if chunk == 0:
            text = f"document {'ABCD'[document]}: {positives} positive{'s' * (positives != 1)}, {negatives} negative"
            out.append(f'<text x="{LEFT - 56}" y="{y + 25}" text-anchor="end">{text}{"s" * (negatives != 1)}</text>')
        name = f"{'ABCD'[document]}{chunk + 1}"
        out.append(f'<text x="{LEFT - 12}" y="{y + 25}" text-anchor="end" font-weight="bold">{name}</text>')
        place = f'x="{LEFT + (row + 0.5) * CELL}" y="{TOP - 10}"'
        out.append(f'<text {place} text-anchor="middle" font-weight="bold">{name}</text>')
        for other in range(BATCH):
            x, kind = LEFT + other * CELL + 1, EMPTY
            if other in contexts[row]:
                kind = POSITIVE if other // PACKING == document else NEGATIVE
            place = f'x="{x}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}"'
            out.append(f'<rect {place} fill="{kind}"/>')
            if other == row:  # causal: only the lower triangle
                corners = f"{x},{y + 1} {x},{y + CELL - 1} {x + CELL - 2},{y + CELL - 1}"
                out.append(f'<polygon points="{corners}" fill="{OWN}"/>')
    for line in range(0, BATCH + 1, PACKING):
        at = TOP + line * CELL
        out.append(f'<path d="M {LEFT - 40} {at} H {LEFT + BATCH * CELL}" stroke="#999"/>')
    notes = [
        (OWN, "its own context, causal, positions 0, 1, 2 …"),
        (POSITIVE, "positives: earlier chunks of its document,"),
        (None, "whole, every key at position 0"),
        (NEGATIVE, "negatives: chunks of other documents,"),
        (None, "likewise; nothing tells them from positives"),
        (None, "but what the keys themselves say"),
        (None, ""),
        (None, "One softmax over all of it; gradients reach"),
        (None, "the keys and values of every row that is seen,"),
        (None, "so keys learn to be told apart."),
    ]
    x, y = LEFT + BATCH * CELL + 20, TOP + 14
    for colour, text in notes:
        if colour:
            out.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{colour}"/>')
        out.append(f'<text x="{x + 22}" y="{y}" fill="#333">{text}</text>')
        y += 22
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
