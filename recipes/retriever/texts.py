"""Writes the unlabelled examples that the packaged retriever is pretrained on (LLARA).

    python recipes/retriever/texts.py OUT.jsonl --from DOCUMENTS SHARE [--from ...] --exclude SET [--exclude ...]
        [--examples N]

An example is a part of a document, the words in it, and the words that follow it. Half of the parts are one sentence
(one line of code), as queries are short; the others have up to 70 words, like passages. SHARE is the fraction of
examples from DOCUMENTS: files and folders of documents, or a corpus.jsonl, of which only `text` is read. Texts that
equal or nearly equal a query or document of a SET (an evaluation set, as a BEIR folder) are excluded and counted: those
that share half of the shorter text's sequences of five words.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencex

from llamory.documents import find_files, read_documents
from llamory.evaluation.datasets import DecontaminationIndex, words

LONG = 70  # words of a long piece, and of what follows
LEAST = 4  # words of a piece
SEED = 42


def units(text: str, *, code: bool) -> list[str]:
    """Sentences, or lines of code."""
    parts = text.splitlines() if code else sentencex.segment("en", text)
    return [part for part in parts if part.strip()]


def filled(parts: list[str], joint: str, most: int) -> tuple[str, int]:
    """The first parts that have at most `most` words together, at least one part, and their number."""
    count = total = 0
    while count < len(parts) and (not count or total + len(parts[count].split()) <= most):
        total += len(parts[count].split())
        count += 1
    return joint.join(parts[:count]), count


def example(text: str, *, code: bool, rng: random.Random) -> dict[str, str] | None:
    """One example of a document, short or long; None if the selected part is too short."""
    parts, joint = units(text, code=code), "\n" if code else " "
    if not parts:
        return None
    short = rng.random() < 0.5
    start = rng.randrange(len(parts)) if short or len(parts) > 8 else 0
    piece, taken = filled(parts[start:], joint, 1 if short else LONG)
    if len(words(piece)) < LEAST:
        return None
    entry = {"input": piece, "output_summarize": piece}
    following, _ = filled(parts[start + taken :], joint, LONG)
    return entry | ({"output_predict": following} if following.strip() else {})


def pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """Texts of a corpus, or of the sections of documents, and whether they are code."""
    if path.name == "corpus.jsonl":
        code = "functions" in path.parts
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["text"], code
        return
    for document in read_documents(find_files([path]), skip_broken=True):
        parts = [section.text for section in document.sections]
        while parts:
            together = [parts.pop(0)]
            while parts and sum(map(len, together)) < 1000:
                together.append(parts.pop(0))
            yield "\n\n".join(together), document.code


def main() -> None:
    """Write the examples in random order with a fixed seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--from", dest="sources", nargs=2, action="append", required=True, metavar=("PATH", "SHARE"))
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="SET")
    parser.add_argument("--examples", type=int, default=40_000)
    options = parser.parse_args()
    rng, judged = random.Random(SEED), DecontaminationIndex(options.exclude)
    found = []
    for name, share in options.sources:
        wanted = int(options.examples * float(share))
        texts = list(pieces(Path(name)))
        rng.shuffle(texts)
        taken: list[dict[str, str]] = []
        near = at = 0
        while len(taken) < wanted and at < 4 * len(texts):  # a long text gives several examples, a short one repeats
            text, code = texts[at % len(texts)]
            at += 1
            made = example(text, code=code, rng=rng)
            if made is None:
                continue
            if any(judged.contains(part) for part in (text, *set(made.values()))):
                near += 1
            else:
                taken.append(made)
        message = f"{len(taken):,} examples of {len(texts):,} texts; {near:,} near copies were excluded"
        sys.stdout.write(f"{name}: {message}\n")
        found += taken
    rng.shuffle(found)
    with options.output.open("w", encoding="utf-8") as file:
        for entry in found:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
