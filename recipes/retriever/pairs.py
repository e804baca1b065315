"""Writes the pairs of queries and documents that the packaged retriever is fine-tuned on.

    python recipes/retriever/pairs.py OUT.jsonl --set BEIR SPLIT COUNT [--set ...] [--texts DOCUMENTS COUNT]
        --exclude SET [--exclude ...]

COUNT relevant pairs are sampled from a split of each BEIR folder. In DOCUMENTS, which have no queries, a sentence is
the query for the sentences around it. Texts that equal or nearly equal a query or document of a SET (an evaluation set)
are excluded and counted: those that share half of the shorter text's sequences of five words.
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
from llamory.training.pairs import load_pairs

AROUND = 80  # minimum words of the text that a sentence is selected from
LEAST, MOST = 6, 25  # words of such a sentence
SEED = 42


def sentences_and_surroundings(path: Path) -> Iterator[tuple[str, str]]:
    """A sentence and the text around it, for each part of a document with about AROUND words."""
    for document in read_documents(find_files([path]), skip_broken=True):
        piece: list[str] = []
        for sentence in sentencex.segment("en", document.text):
            piece.append(" ".join(sentence.split()))
            if sum(len(each.split()) for each in piece) >= AROUND:
                rng = random.Random(" ".join(piece))
                fit = [i for i, each in enumerate(piece) if LEAST <= len(words(each)) <= MOST]
                if fit and len(piece) > 2:
                    selected = rng.choice(fit)
                    yield piece[selected], " ".join(piece[:selected] + piece[selected + 1 :])
                piece = []


def main() -> None:
    """Write the pairs in random order with a fixed seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--set", dest="sets", nargs=3, action="append", default=[], metavar=("BEIR", "SPLIT", "COUNT"))
    parser.add_argument("--texts", nargs=2, action="append", default=[], metavar=("DOCUMENTS", "COUNT"))
    parser.add_argument("--exclude", type=Path, action="append", default=[], metavar="SET")
    options = parser.parse_args()
    rng, judged = random.Random(SEED), DecontaminationIndex(options.exclude)
    sources: list[tuple[str, list[tuple[str, str]], int]] = []
    for name, split, count in options.sets:
        examples = load_pairs([name], split=split).examples
        sources.append((name, [(each.query, each.positives[0]) for each in examples], int(count)))
    for name, count in options.texts:
        sources.append((name, list(sentences_and_surroundings(Path(name))), int(count)))
    found = []
    for name, pairs, wanted in sources:
        rng.shuffle(pairs)
        selected: list[tuple[str, str]] = []
        near = 0
        for query, text in pairs:
            if len(selected) == wanted:
                break
            if judged.contains(text) or judged.contains(query):
                near += 1
            else:
                selected.append((query, text))
        sys.stdout.write(f"{name}: {len(selected):,} of {len(pairs):,} pairs; {near:,} near copies were excluded\n")
        found += selected
    rng.shuffle(found)
    with options.output.open("w", encoding="utf-8") as file:
        for query, text in found:
            file.write(json.dumps({"query": query, "pos": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
