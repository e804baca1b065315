"""The main job from end to end: adapt a LLaMA to documents without labels, index them, find things in them.

The documents are the functions and docstrings of this Python's own standard library.
"""

from __future__ import annotations

import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from rich.console import Console

QUESTIONS = [
    "how do I parse a date from a string",
    "copy a whole directory tree",
    "run a command and read its output",
]
# Modules that programs use every day: some 2,500 passages, few enough for the patience of two cores.
MODULES = """
argparse base64 bisect calendar collections/__init__ configparser contextlib copy csv datetime difflib email/utils
fnmatch fractions functools getpass glob gzip heapq html/__init__ inspect ipaddress json/__init__ json/decoder
json/encoder linecache locale logging/__init__ mimetypes operator os pathlib pickle platform pprint queue random re
sched secrets shelve shlex shutil smtplib socket statistics string subprocess tarfile tempfile textwrap threading
timeit tokenize traceback types urllib/parse urllib/request uuid warnings weakref webbrowser zipfile
""".split()
STEPS, BATCH, PASSAGE = 60, 16, 96


def main() -> int:
    """Run the demo; gives the exit code."""
    started = time.perf_counter()
    console = Console(file=sys.stderr)

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - started), 60)
        console.print(f"[bold][{minutes}:{seconds:02}][/bold] {text}", highlight=False)

    from llamory.cli.output import working
    from llamory.library import Library
    from llamory.training.llara import train_llara
    from llamory.training.settings import LlaraSettings

    library_folder = Path(sysconfig.get_path("stdlib"))
    files = [str(file) for name in MODULES if (file := library_folder / f"{name}.py").exists()]
    with tempfile.TemporaryDirectory(prefix="llamory-demo-") as folder, working():
        say(f"Adapting SmolLM2-135M to {len(files)} modules of the standard library, without labels ({STEPS} steps).")
        settings = LlaraSettings(
            data=files,
            output=f"{folder}/model",
            passage_length=PASSAGE,
            batch_size=BATCH,
            steps=STEPS,
            learning_rate=1e-4,
            bf16=True,
            log_every=5,
            save_every=10 * STEPS,
        )
        trained = train_llara(settings)
        say("Loading the result as a SentenceTransformer and indexing the modules.")
        library = Library(f"{folder}/library", model=trained["embedder"], bf16=True)
        report = library.add(files, passage_length=PASSAGE)
        say(f"{report.passages} passages are indexed.")
        for question in QUESTIONS:
            Console().print(f"\n[bold]{question}[/bold]")
            for hit in library.search(question, top=3):
                place = f"{Path(hit.source).relative_to(library_folder)}:{hit.line}"
                Console().print(f"  {hit.score:.2f}  {hit.title or place}  ({place})", highlight=False)
        say("Done.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
