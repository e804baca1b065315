"""Answers to questions about facts that are stated once in many documents.

    python benchmarks/facts.py TEXTS [TEXTS ...] [--model reader] [--num-documents 100] [--num-questions 100]
        [--mem-search pages] [--only NAME ...] [--json FILE]

Each document of real text has one sentence with a number, a name, a date or a sentence. Compared are: the reader with
all documents in memory, each encoded by itself, which selects evidence by `evidence_ratio` as `llamory ask` does, or
uses all of it; the reader with all texts as one document; a library, which attaches the documents that the packaged
retriever finds; the stock base model with the right document in its prompt; and the stock model with as many documents
in its prompt as its context holds. An answer with the secret's words is correct. All in bfloat16 (the library's reader
in float32). Answers that FILE already has are kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, logging

from llamory.documents import find_files, read_file
from llamory.evaluation.haystack import draw_secret
from llamory.library import Library
from llamory.longllama.loading import load_long_model
from llamory.models.base import encode_document, load_model, load_tokenizer
from llamory.qa.evidence import DEFAULT_EVIDENCE_RATIO
from llamory.qa.generation import GenerationSettings, Generator

HOUSES = [
    f"{name} {kind}"
    for kind in ("House", "Hall", "Lodge")
    for name in (
        "Abbotsford Brinkley Carraway Dunmore Elsinore Fairbanks Greystone Hollins Inverness Juniper Kingsley Larkspur "
        "Marlow Newbury Orchard Primrose Queensway Rosewood Saltmarsh Tamarind Upton Verbena Westbrook Yarrow Zennor "
        "Ashdown Birchwood Cloverdale Driftwood Edgewater Foxglove Glenmore Hawthorn Ivybridge"
    ).split()
]
WAYS = {
    "number": ("The archive box of {} carries the number {}.", "Which number does the archive box of {} carry?"),
    "name": ("The organ of {} was tuned by {}.", "Who tuned the organ of {}?"),
    "date": ("The roof of {} was repaired on {}.", "When was the roof of {} repaired?"),
    "sentence": ('The sign at the gate of {} reads: "{}"', "What does the sign at the gate of {} read?"),
}
ANSWER_TOKENS = 40


@dataclass
class Case:
    """A document with a fact, and the question about it."""

    text: str
    question: str
    key: str
    kind: str


def contains_key(answer: str, key: str) -> bool:
    """Whether an answer has a secret's words in sequence."""
    found, wanted = (re.findall(r"\w+", text.casefold()) for text in (answer, key))
    return any(found[i : i + len(wanted)] == wanted for i in range(len(found)))


def cases(texts: list[Path], number: int, size: int) -> list[Case]:
    """Documents of about `characters` characters, each with a fact."""
    rng, cases_made = random.Random(0), []
    kinds = list(WAYS)
    for path in find_files(texts):
        for document in read_file(path):
            if len(cases_made) == number:
                return cases_made
            paragraphs: list[str] = []
            for section in document.sections:
                if sum(map(len, paragraphs)) < size:
                    paragraphs.append(section.text[:size])
            if sum(map(len, paragraphs)) < size // 2:
                continue
            kind, house = kinds[len(cases_made) % len(kinds)], HOUSES[len(cases_made)]
            key = draw_secret(kind, rng)
            stated, asked = WAYS[kind]
            paragraphs.insert(rng.randint(0, len(paragraphs)), stated.format(house, key))
            cases_made.append(Case("\n\n".join(paragraphs), asked.format(house), key, kind))
    raise SystemExit(f"{', '.join(map(str, texts))} have only {len(cases_made)} documents of {size // 2} characters.")


def memory_answers(
    name: str,
    texts: list[str],
    asked: list[Case],
    settings: dict[str, Any],
    evidence_ratio: float = DEFAULT_EVIDENCE_RATIO,
) -> list[str]:
    """Answers with all texts in memory, each encoded by itself."""
    model, tokenizer = load_long_model(name, dtype=torch.bfloat16, **settings), load_tokenizer(name)
    memory = model.new_memory()
    for number, text in enumerate(texts):
        model.read(encode_document(text, tokenizer), memory, segment=str(number))
    sys.stdout.write(f"{memory.length():,} tokens in memory\n")
    generator, generation_settings, answers = (
        Generator(model, tokenizer, name),
        GenerationSettings(max_new_tokens=ANSWER_TOKENS),
        [],
    )
    selection_seconds = 0.0
    for case in asked:
        started = time.perf_counter()
        evidence = memory.slice(generator.select_evidence(case.question, memory, memory.segments, evidence_ratio))
        selection_seconds += time.perf_counter() - started
        answers.append(
            generator.generate(
                generator.prompt(case.question).ids, model.memory_cache(evidence), generation_settings
            ).text
        )
    sys.stdout.write(f"{selection_seconds / len(asked):.2f} s per question to select evidence\n")
    return answers


def prompt_answers(name: str, documents: list[Case], questions: int, *, everything: bool) -> list[str]:
    """Answers of the stock model with the right document in its prompt, or with as many as fit."""
    model, tokenizer = load_model(name, dtype=torch.bfloat16), load_tokenizer(name)
    max_prompt_tokens = model.config.max_position_embeddings - 2 * ANSWER_TOKENS - 100
    whole = ""
    if everything:
        for case in random.Random(1).sample(documents, len(documents)):
            longer = f"{whole}{case.text}\n\n"
            if len(tokenizer(longer)["input_ids"]) > max_prompt_tokens:
                break
            whole = longer
    answers = []
    cache, known = DynamicCache(), 0
    for case in documents[:questions]:
        messages = [{"role": "user", "content": f"{whole or case.text}\n\n{case.question}"}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -max_prompt_tokens:]
        if everything and not known:
            known = ids.shape[1] - 80  # the common prefix of the prompts is encoded once
            with torch.no_grad():
                model(ids[:, :known], past_key_values=cache, logits_to_keep=1)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache) if known else None,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        answers.append(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def library_answers(name: str, documents: list[Case], questions: int, top: int) -> list[str]:
    """Answers about the first documents, from those that the packaged retriever finds."""
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        for number, case in enumerate(documents):
            (texts / f"{number}.txt").write_text(case.text, encoding="utf-8")
        library = Library(Path(folder) / "library", "default", bf16=True, reader=name)
        library.add(texts, progress=False)
        generation_settings = {"top_documents": top, "citations": 0, "max_new_tokens": ANSWER_TOKENS}
        return [library.ask(case.question, **generation_settings).text for case in documents[:questions]]


def main() -> None:
    """Ask all questions, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", default="reader")
    parser.add_argument("--base", default="base")
    parser.add_argument("--num-documents", type=int, default=100)
    parser.add_argument("--num-questions", type=int, help="about so many of them; default: about each")
    parser.add_argument("--characters", type=int, default=4000, help="of a document")
    parser.add_argument("--top-documents", type=int, default=20, help="documents that are found for a question")
    parser.add_argument("--mem-search")
    parser.add_argument("--mem-top-k", type=int)
    parser.add_argument("--only", nargs="+", default=[], help="of the ways, by their names; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    documents = cases(options.texts, options.num_documents, options.characters)
    number = options.num_questions or len(documents)
    asked, texts = documents[:number], [case.text for case in documents]
    joined = "\n\n".join(texts)
    settings = {key: value for key in ("mem_search", "mem_top_k") if (value := getattr(options, key)) is not None}
    ways = {
        "memory of all documents": lambda: memory_answers(options.model, texts, asked, settings),
        "memory of one document of all texts": lambda: memory_answers(options.model, [joined], asked, settings),
        "memory of all documents, all at once": lambda: memory_answers(
            options.model, texts, asked, settings, evidence_ratio=0
        ),
        "memory of those found, of all documents": lambda: library_answers(
            options.model, documents, number, options.top_documents
        ),
        "the right document in the prompt": lambda: prompt_answers(options.base, documents, number, everything=False),
        "all that fits in the prompt": lambda: prompt_answers(options.base, documents, number, everything=True),
    }
    about: dict[str, Any] = {"model": options.model, "base": options.base, "documents": len(documents)}
    about |= {"questions": number, "characters": options.characters, "top": options.top_documents, **settings}
    answers = known(options.json, about)
    if unknown := set(options.only) - set(ways):
        parser.error(f"there is no way {', '.join(sorted(unknown))}; choose of {', '.join(ways)}")
    for way, make in ways.items():
        if options.only and way not in options.only:
            continue
        answers[way] = answers.get(way) or make()
        sys.stdout.write(f"{way}: {accuracy_by_kind(answers[way], asked)}\n")
        sys.stdout.flush()
        if options.json:
            records = [
                {"question": case.question, "key": case.key, "kind": case.kind}
                | {way: way_answers[number] for way, way_answers in answers.items()}
                for number, case in enumerate(asked)
            ]
            right = {way: accuracy_by_kind(way_answers, asked) for way, way_answers in answers.items()}
            whole = {"about": about, "right": right, "answers": records}
            options.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def known(file: Path | None, about: dict[str, Any]) -> dict[str, list[str]]:
    """The answers of an earlier call."""
    if file is None or not file.exists():
        return {}
    saved = json.loads(file.read_text(encoding="utf-8"))
    if saved["about"] != about:
        raise SystemExit(f"{file} has answers of another call, {saved['about']}; give another file.")
    return {way: [each[way] for each in saved["answers"]] for way in saved["right"]}


def accuracy_by_kind(answers: list[str], asked: list[Case]) -> dict[str, float]:
    """The fraction of correct answers, of all and of each kind."""
    right = [(case.kind, contains_key(answer, case.key)) for answer, case in zip(answers, asked, strict=True)]
    by_kind = {kind: [ok for one, ok in right if one == kind] for kind in WAYS}
    return {"all": sum(ok for _, ok in right) / len(right)} | {kind: sum(ok) / len(ok) for kind, ok in by_kind.items()}


if __name__ == "__main__":
    main()
