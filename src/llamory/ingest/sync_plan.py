"""Compare documents with a memory: what to encode, keep, rename and remove."""

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
    """The changes that bring a memory up to date with documents.

    Attributes:
        read: documents to encode, by segment name.
        replaced: names in `read` whose segment exists with older content.
        unchanged: documents that the memory has, by segment name.
        removed: segments whose document is no longer in its file.
        moved: new names of segments whose document has moved, by old name.
    """

    read: dict[str, TokenizedDocument] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    unchanged: dict[str, TokenizedDocument] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    moved: dict[str, str] = field(default_factory=dict)

    @property
    def has_changes(self) -> bool:
        """Whether the memory changes."""
        return bool(self.read or self.removed or self.moved)

    def mark_unchanged(
        self, documents: Iterable[TokenizedDocument], find_segment: Callable[[TokenizedDocument], str | None]
    ) -> list[TokenizedDocument]:
        """Mark the documents that have a segment as unchanged and return the others."""
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
    ) -> MemoryBank:
        """The changed memory; both banks stay as they are.

        Args:
            bank: the memory.
            encoded: has the documents of `read` in segments named by their source.
            get_metadata: gives the metadata of a document.
        """
        removed = set(self.removed)
        dropped = removed.union(self.replaced)
        result, new = bank.slice([]), bank.slice([])
        result.attach(bank, [name for name in bank.segments if name not in dropped])
        result.rename_all(self.moved)
        for name, moved in self.moved.items():
            result.set_metadata(moved, **get_metadata(self.unchanged[name]))
        new.attach(encoded, [document.source for document in self.read.values()])
        new.rename_all({document.source: name for name, document in self.read.items()})
        result.attach(new)
        # A replaced document keeps its place.
        order = [self.moved.get(name, name) for name in bank.segments if name not in set(self.removed)]
        result.reorder(list(dict.fromkeys([*order, *self.read])))
        return result


def diff_documents(segments: Sequence[dict[str, Any]], documents: Sequence[TokenizedDocument]) -> SyncPlan:
    """Compare documents with the segments of a memory (dictionaries with `name` and `metadata`)."""
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
    """Segments that no document has been matched with."""

    def __init__(self, metadata: dict[str, dict[str, Any]]):
        self._metadata = metadata
        self.names = dict.fromkeys(metadata)
        self._index: dict[tuple, dict[tuple, list[str]]] = {}

    def match(self, document: TokenizedDocument, key: tuple[str, ...]) -> str | None:
        """The first segment whose metadata equal a document's in the fields of `key`; it is claimed."""
        if key not in self._index:
            self._index[key] = defaultdict(list)
            for name in self.names:
                self._index[key][tuple(self._metadata[name].get(field_name) for field_name in key)].append(name)
        return self._claim(self._index[key][tuple(getattr(document, field_name) for field_name in key)])

    def match_moved(self, document: TokenizedDocument) -> str | None:
        """The segment of the document's name and content whose file no longer exists: the file was moved."""
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
    """A segment name: the document's label, with more parent folders if that name is used."""
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
