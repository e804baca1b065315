"""Writes questions about the modules that `python_documents.py` wrote, with answers that occur in them.

    python recipes/reader/python_documents.py DOCUMENTS
    python recipes/reader/module_questions.py DOCUMENTS/train QUESTIONS.jsonl

Each line has a part of a module (`document`) and a chat about it (`messages`): its topic, what its functions do, their
arguments, and the values of its constants. `llamory train instruct` puts the document into memory.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

PIECE = (3_000, 16_000)  # characters; some 5,000 tokens at most
TURNS = 12
LONGEST = 40  # words of an answer
WORDINGS = {
    "about": ["What is this document about?", "What is {name}?", "What does the module {name} do?", "Describe {name}."],
    "does": ["What does {name} do?", "What is {name} for?", "Describe {name} in a sentence."],
    "takes": ["Which arguments does {name} take?", "What are the arguments of {name}?"],
    "value": ["What is the value of {name}?", "What is {name} set to?"],
}

Question = tuple[str, str, str]  # kind, name, answer


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def questions(node: ast.AST, scope: str = "") -> Iterator[tuple[int, int, Question]]:
    """First and last line of each definition that can be asked about, and the question."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = scope + child.name
            docstring = ast.get_docstring(child)
            if docstring:
                yield child.lineno, child.body[0].end_lineno or 0, ("does", name, first_sentence(docstring))
            if isinstance(child, ast.ClassDef):
                yield from questions(child, f"{name}.")
            elif 0 < len(child.args.args) < 7 and not child.name.startswith("__"):
                yield child.lineno, child.body[0].lineno, ("takes", name, ast.unparse(child.args))
        elif isinstance(child, ast.Assign) and len(child.targets) == 1 and isinstance(child.targets[0], ast.Name):
            value = ast.unparse(child.value)
            if isinstance(child.value, ast.Constant) and 1 < len(value) < 60:
                yield child.lineno, child.end_lineno or 0, ("value", scope + child.targets[0].id, value)


def pieces(tree: ast.Module, lines: list[str], rng: random.Random) -> Iterator[tuple[int, int]]:
    """First and last line (from 1) of parts of a module; each starts with a top-level statement."""
    starts = [min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) for node in tree.body]
    start, room = 1, rng.randint(*PIECE)
    for begin in [*starts[1:], len(lines) + 1]:
        size = sum(len(line) + 1 for line in lines[start - 1 : begin - 1])
        if size > PIECE[0] or begin > len(lines):
            end = begin - 1
            while sum(len(line) + 1 for line in lines[start - 1 : end]) > room:
                end -= 1
            yield start, end
            start, room = begin, rng.randint(*PIECE)


def chats(path: Path) -> Iterator[dict[str, object]]:
    """Parts of a module with a chat about each."""
    text = path.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in strings
        tree = ast.parse(text)
    lines, rng = text.splitlines(), random.Random(path.name)
    asked = list(questions(tree))
    module, docstring = path.name.removesuffix(".py"), ast.get_docstring(tree)
    for first, last in pieces(tree, lines, rng):
        inside = [question for start, end, question in asked if first <= start and end <= last]
        inside = [each for each in inside if 1 < len(each[2].split()) <= LONGEST or each[0] != "does"]
        chosen = rng.sample(inside, min(len(inside), TURNS))
        if first == 1 and docstring and len(first_sentence(docstring).split()) <= LONGEST:
            chosen.insert(rng.randint(0, len(chosen)), ("about", module, first_sentence(docstring)))
        if len(chosen) < 3:
            continue
        messages = []
        for kind, name, answer in chosen:
            wording = rng.choice(WORDINGS[kind]).format(name=name)
            messages += [{"role": "user", "content": wording}, {"role": "assistant", "content": answer}]
        yield {"document": "\n".join(lines[first - 1 : last]), "messages": messages}


def main() -> None:
    """Write the questions."""
    if len(sys.argv) != 3:
        raise SystemExit("Give the folder of modules and an output file.")
    count = 0
    with Path(sys.argv[2]).open("w", encoding="utf-8") as file:
        for path in sorted(Path(sys.argv[1]).glob("*.py")):
            for chat in chats(path):
                file.write(json.dumps(chat) + "\n")
                count += 1
    sys.stdout.write(f"{count} chats\n")


if __name__ == "__main__":
    main()
