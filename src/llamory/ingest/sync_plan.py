"""What is to be read into a memory and what is there already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamory.ingest.documents import Manuscript
from llamory.memory import MemoryBank


@dataclass
class Plan:
    """What becomes of a memory's segments.

    Attributes:
        read: documents to read, by the name of their segment.
        replaced: those names among them whose segment is there already, with an older content.
        unchanged: documents that are there, by the name of their segment.
        removed: segments whose document is no longer in its file.
        moved: segments whose document is now at another place, with their new names.
    """

    read: dict[str, Manuscript] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    unchanged: dict[str, Manuscript] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> bool:
        """Whether anything becomes different."""
        return bool(self.read or self.removed or self.moved)

    def keep(
        self, manuscripts: Iterable[Manuscript], segment_of: Callable[[Manuscript], str | None]
    ) -> list[Manuscript]:
        """Note the documents that have a segment as unchanged; gives those that have none."""
        rest = []
        for manuscript in manuscripts:
            name = segment_of(manuscript)
            if name is None:
                rest.append(manuscript)
            else:
                self.unchanged[name] = manuscript
        return rest

    def apply(self, bank: MemoryBank, fresh: MemoryBank, facts: Callable[[Manuscript], dict[str, Any]]) -> None:
        """Change a memory as planned.

        Args:
            bank: the memory.
            fresh: has what was read, in segments named by their source.
            facts: gives what is noted of a document.
        """
        order = [self.moved.get(name, name) for name in bank.segments if name not in self.removed]
        for name in (*self.removed, *self.replaced):
            bank.drop(name)
        # In two steps, as lines that moved may take each other's names.
        for number, name in enumerate(self.moved):
            bank.rename(name, f"\0{number}")
        for number, (name, new) in enumerate(self.moved.items()):
            bank.rename(f"\0{number}", new)
            bank.set_metadata(new, **facts(self.unchanged[name]))
        fresh = fresh.fork()
        for name, manuscript in self.read.items():
            fresh.rename(manuscript.source, "\0")
            bank.attach(fresh, ["\0"])
            bank.rename("\0", name)
            fresh.drop("\0")
        bank.reorder([*order, *(name for name in self.read if name not in order)])


def make_plan(segments: Sequence[dict[str, Any]], manuscripts: Sequence[Manuscript]) -> Plan:
    """Compare documents with the segments of a memory (`name` and `facts` of each)."""
    facts = {segment["name"]: segment["metadata"] for segment in segments}
    plan, free = Plan(), _Matching(facts)
    changed = list(manuscripts)
    # Lines of a JSON lines file may have moved: the same content in the same file is the same document.
    changed = plan.keep(changed, lambda each: free.take(each, ("source", "digest")))
    changed = plan.keep(changed, lambda each: free.take(each, ("file", "digest")))
    older = {each.source: free.take(each, ("source",)) for each in changed}
    changed = plan.keep(changed, lambda each: None if older[each.source] else free.take_lost(each))
    files = {each.file for each in manuscripts}
    plan.removed = [name for name in free.names if facts[name].get("file") in files]
    moved = [name for name, each in plan.unchanged.items() if facts[name]["source"] != each.source]
    taken = set(facts) - {*plan.removed, *moved}
    for name in moved:
        plan.moved[name] = _unique(plan.unchanged[name], taken)
        taken.add(plan.moved[name])
    for manuscript in changed:
        name = older[manuscript.source] or _unique(manuscript, taken)
        taken.add(name)
        plan.read[name] = manuscript
    plan.replaced = [name for name, each in plan.read.items() if older[each.source] is not None]
    return plan


class _Matching:
    """Segments that no document was found for yet."""

    def __init__(self, facts: dict[str, dict[str, Any]]):
        self._facts = facts
        self.names = dict.fromkeys(facts)
        self._by: dict[tuple, dict[tuple, list[str]]] = {}

    def take(self, manuscript: Manuscript, key: tuple[str, ...]) -> str | None:
        """The first segment with these facts in common with a document; it is taken then."""
        if key not in self._by:
            self._by[key] = defaultdict(list)
            for name in self.names:
                self._by[key][tuple(self._facts[name].get(fact) for fact in key)].append(name)
        return self._pick(self._by[key][tuple(getattr(manuscript, fact) for fact in key)])

    def take_lost(self, manuscript: Manuscript) -> str | None:
        """A segment of this document's name and content whose file is gone: it was moved here."""
        facts = self._facts.get(manuscript.label, {})
        if facts.get("digest") != manuscript.digest or Path(facts.get("file", "")).exists():
            return None
        return self._pick([manuscript.label])

    def _pick(self, names: list[str]) -> str | None:
        for name in names:
            if name in self.names:
                del self.names[name]
                return name
        return None


def _unique(manuscript: Manuscript, taken: set[str]) -> str:
    """A name for a document's segment: its label, with more folders in front where others have that name."""
    name, whole = manuscript.label, manuscript.source.replace("\\", "/")
    while name in taken and name != whole:
        rest = whole[: -len(name)].rstrip("/")
        name = whole[rest.rfind("/") + 1 :] or whole
        if rest.rfind("/") <= 0:
            name = whole
    number = 2
    while name in taken:
        name, number = f"{whole} ({number})", number + 1
    return name
