"""The memory of a long reader as a thing of its own: tensors only, no model inside."""

from llamory.memory.bank import MemoryBank
from llamory.memory.files import read_header
from llamory.memory.segments import SegmentSpan

__all__ = ["MemoryBank", "SegmentSpan", "read_header"]
