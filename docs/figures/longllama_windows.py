"""Draws how a prompt is cut into windows and who sees what, from the plan that the model itself uses.

python docs/figures/longllama_windows.py        writes docs/figures/longllama_windows.svg
"""

from __future__ import annotations

from pathlib import Path

from llamory.longllama.windows import split_prompt

PROMPT, CONTEXT, LAST, GENERATED = 14, 4, 3, 3
CELL, LEFT, TOP = 26, 265, 92
WINDOW, LOCAL, MEMORY, NEW = "#4c8bb8", "#c8553d", "#e8c48f", "#8fb996"


def places() -> list[tuple[int, int, bool]]:
    """Window, local position and whether it stays, of every token; generated ones go on in the last window."""
    steps = split_prompt([PROMPT], CONTEXT, LAST, keep_local=True)
    tokens = [
        (window, position, step.keep_local) for window, step in enumerate(steps) for position in range(step.lengths[0])
    ]
    last, position, _ = tokens[-1]
    return tokens + [(last, position + 1 + new, True) for new in range(GENERATED)]


def draw() -> str:
    """The picture as SVG."""
    tokens = places()
    count = len(tokens)
    width, height = LEFT + count * CELL + 330, TOP + count * CELL + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-weight="bold">what each token (row) sees in a memory layer; the number is the '
        "key's position</text>",
        f'<text x="{LEFT}" y="38" fill="#444">context of {CONTEXT} tokens, last window of {LAST}, a prompt of {PROMPT} '
        f"and {GENERATED} generated tokens</text>",
    ]
    for query, (window, position, stays) in enumerate(tokens):
        y = TOP + query * CELL
        colour = NEW if query >= PROMPT else LOCAL if stays else WINDOW
        out.append(f'<rect x="{LEFT - 30}" y="{y + 1}" width="22" height="{CELL - 2}" fill="{colour}" rx="3"/>')
        place = f'x="{LEFT + query * CELL + 1}" y="{TOP - 28}"'
        out.append(f'<rect {place} width="{CELL - 2}" height="20" fill="{colour}" rx="3"/>')
        text = f'x="{LEFT - 19}" y="{y + 18}" text-anchor="middle" fill="white"'
        out.append(f"<text {text}>{min(position, CONTEXT - 1)}</text>")
        for key in range(count):
            place = f'x="{LEFT + key * CELL + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}"'
            if key > query:
                out.append(f'<rect {place} fill="#f4f4f4"/>')
                continue
            near = tokens[key][0] == window and query - key < CONTEXT
            shown = tokens[key][1] if near else 0
            out.append(f'<rect {place} fill="{colour if near else MEMORY}" opacity="0.9"/>')
            out.append(
                f'<text x="{LEFT + (key + 0.5) * CELL}" y="{y + 18}" text-anchor="middle" '
                f'fill="{"white" if near else "#7a5a20"}">{shown}</text>'
            )
    steps = split_prompt([PROMPT], CONTEXT, LAST, keep_local=True)
    for step in steps:
        y = TOP + (step.starts[0] + step.stops[0]) / 2 * CELL + 5
        label = "last window: stays local" if step.keep_local else "window: goes into memory"
        out.append(f'<text x="{LEFT - 40}" y="{y}" text-anchor="end">{label}</text>')
    y = TOP + (PROMPT + GENERATED / 2) * CELL + 5
    out.append(f'<text x="{LEFT - 40}" y="{y}" text-anchor="end">generated: the oldest slides out</text>')
    notes = [
        (WINDOW, "local context of a window, causal,"),
        (None, "its positions start at 0"),
        (LOCAL, "local context that stays for generation"),
        (MEMORY, "memory: keys at position 0, one softmax"),
        (None, "with the local context; layers without"),
        (None, "memory don't see it"),
    ]
    x, y = LEFT + count * CELL + 20, TOP + 10
    for colour_or_none, text in notes:
        if colour_or_none:
            out.append(f'<rect x="{x}" y="{y - 12}" width="14" height="14" fill="{colour_or_none}"/>')
        out.append(f'<text x="{x + 22}" y="{y}" fill="#333">{text}</text>')
        y += 22
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
