"""Draws the LLARA sequence and its mask, from the layout that the model itself uses.

python docs/figures/llara_mask.py        writes docs/figures/llara_mask.svg
"""

from __future__ import annotations

from pathlib import Path

import torch

from llamory.llara import LlaraTemplate
from llamory.llara.layout import find_layout

TEMPLATE = LlaraTemplate(
    prefix_ids=(1,),
    summarize_prompt_ids=(2, 3),
    summarize_slot_ids=(10, 11, 12),
    predict_prompt_ids=(2, 4),
    predict_slot_ids=(13, 14, 15),
    ignored_ids=(),
)
PARTS = [  # label, number of tokens, colour
    ('"', 1, "#9aa5b1"),
    ("passage", 5, "#4c8bb8"),
    ('", summarize the above passage … :', 2, "#e0a458"),
    ("<s1> … <s8>", 3, "#c8553d"),
    ('", predict the following passage … :', 2, "#8fb996"),
    ("<s9> … <s16>", 3, "#2f6f4f"),
]
CELL, LEFT, TOP = 22, 290, 78


def draw() -> str:
    """The picture as SVG."""
    ids = torch.tensor([TEMPLATE.sequence([20, 21, 22, 23, 24])])
    layout = find_layout(ids, TEMPLATE)
    visible, positions = layout.visible()[0, 0], layout.position_ids.tolist()
    colours = [colour for _, count, colour in PARTS for _ in range(count)]
    size = len(colours) * CELL
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + size + 260} {TOP + size + 40}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{LEFT + size + 260}" height="{TOP + size + 40}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-weight="bold">may be seen: keys, with their rotary positions</text>',
    ]
    for i, (colour, position) in enumerate(zip(colours, positions, strict=True)):
        x, y = LEFT + i * CELL, TOP + i * CELL
        out.append(f'<rect x="{x + 1}" y="{TOP - 24}" width="{CELL - 2}" height="18" fill="{colour}" rx="3"/>')
        out.append(f'<text x="{x + CELL / 2}" y="{TOP - 32}" text-anchor="middle" fill="#444">{position}</text>')
        out.append(f'<rect x="{LEFT - 24}" y="{y + 1}" width="18" height="{CELL - 2}" fill="{colour}" rx="3"/>')
        for j in range(len(colours)):
            seen = bool(visible[i, j])
            fill = colours[j] if seen else "#f1f1f1"
            place = f'x="{LEFT + j * CELL + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}"'
            out.append(f'<rect {place} fill="{fill}" opacity="{0.85 if seen else 1}"/>')
    row = 0
    for label, count, _ in PARTS:
        y = TOP + (row + count / 2) * CELL + 5
        text = label.replace("<", "&lt;").replace(">", "&gt;")
        out.append(f'<text x="{LEFT - 34}" y="{y}" text-anchor="end">{text}</text>')
        row += count
    notes = [
        (3.5, "next-token loss: passage tokens"),
        (9.5, "words of the passage"),
        (10.3, "= embedding of a document"),
        (14.5, "words of what follows"),
        (15.3, "= embedding of a query"),
    ]
    out += [f'<text x="{LEFT + size + 16}" y="{TOP + at * CELL + 4}" fill="#333">{text}</text>' for at, text in notes]
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
