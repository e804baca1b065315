"""What is to be read into a memory and what is there already."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamory.ingest.documents import TokenizedDocument
from llamory.memory import MemoryBank


@dataclass
class SyncPlan:
    """What becomes of a memory's segments.

    Attributes:
        read: documents to read, by the name of their segment.
        replaced: those names among them whose segment is there already, with an older content.
        unchanged: documents that are there, by the name of their segment.
        removed: segments whose document is no longer in its file.
        moved: segments whose document is now at another place, with their new names.
    """

    read: dict[str, TokenizedDocument] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    unchanged: dict[str, TokenizedDocument] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)

    @property
    def has_changes(self) -> bool:
        """Whether anything becomes different."""
        return bool(self.read or self.removed or self.moved)

    def mark_unchanged(
        self, documents: Iterable[TokenizedDocument], find_segment: Callable[[TokenizedDocument], str | None]
    ) -> list[TokenizedDocument]:
        """Note the documents that have a segment as unchanged; gives those that have none."""
        unmatched = []
        for document in documents:
            name = find_segment(document)
            if name is None:
                unmatched.append(document)
            else:
                self.unchanged[name] = document
        return unmatched

    def apply(
        self, bank: MemoryBank, encoded: MemoryBank, get_metadata: Callable[[TokenizedDocument], dict[str, Any]]
    ) -> None:
        """Change a memory as planned.

        Args:
            bank: the memory.
            encoded: has what was read, in segments named by their source.
            get_metadata: gives what is noted of a document.
        """
        order = [self.moved.get(name, name) for name in bank.segments if name not in self.removed]
        for name in (*self.removed, *self.replaced):
            bank.drop(name)
        # In two steps, as lines that moved may take each other's names.
        for number, name in enumerate(self.moved):
            bank.rename(name, f"\0{number}")
        for number, (name, new) in enumerate(self.moved.items()):
            bank.rename(f"\0{number}", new)
            bank.set_metadata(new, **get_metadata(self.unchanged[name]))
        encoded = encoded.fork()
        for name, document in self.read.items():
            encoded.rename(document.source, "\0")
            bank.attach(encoded, ["\0"])
            bank.rename("\0", name)
            encoded.drop("\0")
        bank.reorder([*order, *(name for name in self.read if name not in order)])


def diff_documents(segments: Sequence[dict[str, Any]], documents: Sequence[TokenizedDocument]) -> SyncPlan:
    """Compare documents with the segments of a memory (`name` and `metadata` of each)."""
    metadata = {segment["name"]: segment["metadata"] for segment in segments}
    plan, unmatched = SyncPlan(), _UnmatchedSegments(metadata)
    remaining = list(documents)
    # Lines of a JSON lines file may have moved: the same content in the same file is the same document.
    remaining = plan.mark_unchanged(remaining, lambda each: unmatched.match(each, ("source", "digest")))
    remaining = plan.mark_unchanged(remaining, lambda each: unmatched.match(each, ("file", "digest")))
    existing_segments = {each.source: unmatched.match(each, ("source",)) for each in remaining}
    remaining = plan.mark_unchanged(
        remaining, lambda each: None if existing_segments[each.source] else unmatched.match_moved(each)
    )
    files = {each.file for each in documents}
    plan.removed = [name for name in unmatched.names if metadata[name].get("file") in files]
    moved = [name for name, each in plan.unchanged.items() if metadata[name]["source"] != each.source]
    used_names = set(metadata) - {*plan.removed, *moved}
    for name in moved:
        plan.moved[name] = _unique_segment_name(plan.unchanged[name], used_names)
        used_names.add(plan.moved[name])
    for document in remaining:
        name = existing_segments[document.source] or _unique_segment_name(document, used_names)
        used_names.add(name)
        plan.read[name] = document
    plan.replaced = [name for name, each in plan.read.items() if existing_segments[each.source] is not None]
    return plan


class _UnmatchedSegments:
    """Segments that no document was found for yet."""

    def __init__(self, metadata: dict[str, dict[str, Any]]):
        self._metadata = metadata
        self.names = dict.fromkeys(metadata)
        self._index: dict[tuple, dict[tuple, list[str]]] = {}

    def match(self, document: TokenizedDocument, key: tuple[str, ...]) -> str | None:
        """The first segment with these facts in common with a document; it is taken then."""
        if key not in self._index:
            self._index[key] = defaultdict(list)
            for name in self.names:
                self._index[key][tuple(self._metadata[name].get(field_name) for field_name in key)].append(name)
        return self._claim(self._index[key][tuple(getattr(document, field_name) for field_name in key)])

    def match_moved(self, document: TokenizedDocument) -> str | None:
        """A segment of this document's name and content whose file is gone: it was moved here."""
        metadata = self._metadata.get(document.label, {})
        if metadata.get("digest") != document.digest or Path(metadata.get("file", "")).exists():
            return None
        return self._claim([document.label])

    def _claim(self, names: list[str]) -> str | None:
        for name in names:
            if name in self.names:
                del self.names[name]
                return name
        return None


def _unique_segment_name(document: TokenizedDocument, used_names: set[str]) -> str:
    """A name for a document's segment: its label, with more folders in front where others have that name."""
    name, full_path = document.label, document.source.replace("\\", "/")
    while name in used_names and name != full_path:
        prefix = full_path[: -len(name)].rstrip("/")
        name = full_path[prefix.rfind("/") + 1 :] or full_path
        if prefix.rfind("/") <= 0:
            name = full_path
    number = 2
    while name in used_names:
        name, number = f"{full_path} ({number})", number + 1
    return name
