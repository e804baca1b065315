"""Documents: text files of many kinds as parts with titles and lines, and as passages of bounded length."""

from llamory.documents.document import Block, Document, Passage
from llamory.documents.files import SUFFIXES, find_files, read_documents, read_file, read_json_lines
from llamory.documents.passages import split_passages

__all__ = [
    "SUFFIXES",
    "Block",
    "Document",
    "Passage",
    "find_files",
    "read_documents",
    "read_file",
    "read_json_lines",
    "split_passages",
]
