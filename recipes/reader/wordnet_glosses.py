"""Writes WordNet's definitions of nouns with their categories, for `llamory eval manyshot`.

    apt-get download wordnet-base && dpkg -x wordnet-base*.deb WORDNET
    python recipes/reader/wordnet_glosses.py WORDNET/usr/share/wordnet/data.noun DIR     writes DIR/{train,test}.jsonl

The categories are eight lexicographer files of WordNet 3.0 (Princeton University, WordNet licence), with equally many
definitions each. The defined words are not written. The hash of a synset's number assigns it to train or test.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

# Numbers of the lexicographer files, from lexnames(5WN).
KINDS = {
    "05": "animal",
    "06": "artifact",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "27": "substance",
    "28": "time",
}
EACH = {"train": 400, "test": 100}
TEST_SHARE = 0.2


def read(path: Path) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """(hash, definition) pairs by part and category."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {part: {kind: [] for kind in KINDS.values()} for part in EACH}
    for line in path.read_text(encoding="utf-8").splitlines():
        head, bar, gloss = line.partition(" | ")
        fields = head.split()
        if not bar or line.startswith(" ") or fields[1] not in KINDS:
            continue
        digest = hashlib.sha256(fields[0].encode()).hexdigest()
        part = "test" if int(digest[:8], 16) < TEST_SHARE * 16**8 else "train"
        definition = gloss.split('; "')[0].strip()
        found[part][KINDS[fields[1]]].append((digest, definition))
    return found


def main() -> None:
    """Write both parts, sorted by hash."""
    if len(sys.argv) != 3:
        raise SystemExit("Give WordNet's data.noun and an output folder.")
    target = Path(sys.argv[2])
    target.mkdir(parents=True, exist_ok=True)
    for part, kinds in read(Path(sys.argv[1])).items():
        chosen = [(*pair, kind) for kind, pairs in kinds.items() for pair in sorted(pairs)[: EACH[part]]]
        with (target / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for _, text, kind in sorted(chosen):
                file.write(json.dumps({"text": text, "label": kind}) + "\n")
        sys.stdout.write(f"{part}: {len(chosen)} definitions\n")


if __name__ == "__main__":
    main()
