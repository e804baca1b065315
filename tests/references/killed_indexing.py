"""A program that indexes again and again in processes that are killed, and lets a last one finish.

    python killed_indexing.py MODEL

It reads jobs from standard input, one JSON object a line (`library`, `docs`, `kills`), and tells of each, as JSON, what
became of its processes. A kill is the seconds after which a process is killed, or `"eN"`: just before (N even)
or just after (N odd) the N/2-th thing it writes. The processes are forked, so that all is imported only once.
"""

import json
import os
import signal
import sys
import time

# Some of these are not used here: the forked processes need not import them each for itself.
import filelock  # noqa: F401
import lancedb.index
import lancedb.query  # noqa: F401
import rich.progress  # noqa: F401

import llamory.documents.scan  # noqa: F401
import llamory.library.store as store_module
from llamory.embedding.pipeline import load_embedder
from llamory.library import Library
from llamory.library import indexer as indexer_module

indexer_module.CHUNKS_PER_BATCH = 4
store_module.COMMITS_PER_COMPACTION = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_at(event: int) -> None:
    """Kill this process before or after the nth thing that it writes."""
    written = iter(range(10**9))

    def around(method):
        def wrapped(*args, **settings):
            number = next(written)
            if number * 2 == event:
                die()
            result = method(*args, **settings)
            if number * 2 + 1 == event:
                die()
            return result

        return wrapped

    for name in ("write", "remove", "compact", "mark_indexed", "clear_indexed"):
        setattr(store_module.PassageStore, name, around(getattr(store_module.PassageStore, name)))
    for name in ("add", "clear"):
        setattr(store_module.PendingVectors, name, around(getattr(store_module.PendingVectors, name)))
    store_module.PassageStore.create = around(store_module.PassageStore.create)


def index(library: str, model, docs: str, kill: str | float | None) -> bool:
    """Index in a process of its own; whether it came to its end."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, str):
            dying_at(int(kill[1:]))
        try:
            report = Library(library, model).add(docs, progress=False)
            os._exit(0 if not report.failed else 3)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(4)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"indexing failed after kills; {kill=}, status {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def main() -> None:
    model = load_embedder(sys.argv[1], device="cpu")
    for line in sys.stdin:
        job = json.loads(line)
        outcomes = [index(job["library"], model, job["docs"], kill) for kill in [*job["kills"], None]]
        assert outcomes.pop()
        print(json.dumps(["finished" if finished else "killed" for finished in outcomes]), flush=True)


if __name__ == "__main__":
    main()
