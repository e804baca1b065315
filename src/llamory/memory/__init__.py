"""The memory of a long reader as a thing of its own: tensors only, no model inside."""

from llamory.memory.bank import MemoryBank
from llamory.memory.files import peek
from llamory.memory.segments import Piece

__all__ = ["MemoryBank", "Piece", "peek"]
