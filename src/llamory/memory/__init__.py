"""The memory of a long-context reader: keys and values in segments, files of them, and search. No model inside."""

from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import SegmentSpan
from llamory.memory.files import read_header

__all__ = ["MemoryBank", "SegmentSpan", "read_header"]
