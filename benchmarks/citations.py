"""Rank of the correct passage in an answer's citations: by baseline-corrected attention and by plain attention.

    python benchmarks/citations.py [--json FILE] [--model base]

Three short documents of three passages each are in memory, and each of sixteen questions is answered by one passage.
The table has the rank of that passage among the nine, by `share` (the citations) and by the plain sum of attention, and
the fraction of all attention to memory that goes to the first token of each document.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from harness import processor
from llamory.documents import Chunk
from llamory.library.qa import LibrarySource
from llamory.library.reader import ReaderConfig
from llamory.qa.attribution import AttentionRecorder

DOCUMENTS = {
    "bridge": (
        "The old bridge over the river Arn was built in 1742 by Johannes Keller. It has seven arches of red sandstone. "
        "The town paid for it with a tax on salt.",
        "In 1898 a flood took two arches away, and they were rebuilt in iron.",
        "Today only people on foot may cross it. Markets are held on it on the first Sunday of May.",
    ),
    "baker": (
        "Maria Lopez opened her bakery in Lisbon in 1987. She is known for bread with walnuts and figs.",
        "Her secret is a sourdough that is fed with honey every morning at four o'clock.",
        "Her son Pedro now runs a second shop in Porto, where he sells ice cream in summer.",
    ),
    "ship": (
        "The ship Aurora left Bergen on 3 March 1911 with a crew of nineteen men. Captain Olaf Berg wanted to reach "
        "Greenland.",
        "After two weeks the ice closed around them. They lived on seal meat for five months.",
        "All of them were saved by a whaler named Dolphin in August.",
    ),
}
QUESTIONS = [
    ("Who built the bridge over the river Arn?", "bridge", 0),
    ("How many arches does the bridge have?", "bridge", 0),
    ("Which tax paid for the bridge?", "bridge", 0),
    ("What happened to the bridge in the flood of 1898?", "bridge", 1),
    ("What were the arches rebuilt in after the flood?", "bridge", 1),
    ("When are markets held on the bridge?", "bridge", 2),
    ("When did Maria Lopez open her bakery?", "baker", 0),
    ("What does Maria Lopez feed her sourdough with?", "baker", 1),
    ("At what time is the sourdough fed?", "baker", 1),
    ("Where is Pedro's shop?", "baker", 2),
    ("What does Pedro sell in summer?", "baker", 2),
    ("When did the ship Aurora leave Bergen?", "ship", 0),
    ("Who was the captain of the Aurora?", "ship", 0),
    ("What did the men live on in the ice?", "ship", 1),
    ("How was the crew of the Aurora saved?", "ship", 2),
    ("What was the whaler called?", "ship", 2),
]


class StubLibrary:
    """What questions need of a library."""

    def __init__(self, path: str):
        self.path = path

    def sources(self) -> list[str]:
        return list(DOCUMENTS)

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        return {
            source: [
                Chunk(f"# {source} part {at}\n\n{text}", source, f"{source} part {at}", at)
                for at, text in enumerate(DOCUMENTS[source])
            ]
            for source in sources
        }


class FirstTokenRecorder(AttentionRecorder):
    """Also records the fraction of the answer's attention on the documents' first tokens."""

    shares: list[float] = []

    def mass(self, bank, segments, *args, **settings):
        mass = super().mass(bank, segments, *args, **settings)
        starts = torch.tensor([0, *(bank.length(segment=each) for each in segments)])[:-1].cumsum(0)
        self.shares.append(float(mass.attention_mass[starts].sum() / mass.attention_mass.sum()))
        return mass


def main() -> None:
    """Ask all questions and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--model", default="base", help="a folder, hub id, .gguf file or 'base'")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = LibrarySource(StubLibrary(folder), ReaderConfig(reader=options.model), progress=False)
        attached_memory = source.load(list(DOCUMENTS)).memory
        print(f"{'question':52}{'drawn':>6}{'plain':>6}  answer")
        for question, document, part in QUESTIONS:
            chat = source.session(documents=["*"], citations=9)
            chat.recorder = FirstTokenRecorder()
            answer = chat.ask(question, max_new_tokens=options.max_new_tokens, evidence_ratio=0)
            right = f"{document}:{part}"
            likeliest = source.reader.generator.select_evidence(
                question, attached_memory, attached_memory.segments, evidence_ratio=1
            )
            drawn = [each.location for each in answer.citations]
            plain = [each.location for each in sorted(answer.citations, key=lambda each: -each.attention)]
            row = {"question": question, "drawn": _rank(right, drawn), "plain": _rank(right, plain)}
            row |= {"document": [piece.segment for piece in likeliest] == [document]}
            rows.append(row | {"answer": answer.text, "first_tokens": FirstTokenRecorder.shares[-1]})
            print(f"{question:52}{row['drawn']:>6}{row['plain']:>6}  {answer.text[:60]!r}", flush=True)
    totals = {
        way: {"first": sum(row[way] == 1 for row in rows), "mean_place": sum(row[way] for row in rows) / len(rows)}
        for way in ("drawn", "plain")
    }
    totals["first_tokens"] = sum(row["first_tokens"] for row in rows) / len(rows)
    for way in ("drawn", "plain"):
        print(f"{way}: {totals[way]['first']} of {len(rows)} in the first place, mean {totals[way]['mean_place']:.2f}")
    totals["documents"] = sum(row["document"] for row in rows)
    print(f"{totals['documents']} of {len(rows)} questions are likeliest with the right document in memory")
    print(f"the three first tokens get {totals['first_tokens']:.0%} of the answers' attention to memory")
    if options.json:
        machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
        facts = {"machine": machine, "command": command, "totals": totals}
        options.json.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def _rank(right: str, ranking: list[str]) -> int:
    """Rank from 1; a passage that isn't cited comes last."""
    return ranking.index(right) + 1 if right in ranking else sum(map(len, DOCUMENTS.values()))


if __name__ == "__main__":
    main()
