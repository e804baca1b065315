"""Documents: text files of many kinds as parts with titles and lines, and as passages of bounded length."""

from llamory.documents.chunking import split_passages
from llamory.documents.document import Block, Document, Passage, place
from llamory.documents.readers import SUFFIXES, find_files, read_documents, read_file, read_json_lines
from llamory.documents.scan import Survey, survey
from llamory.documents.storage import Failure

__all__ = [
    "SUFFIXES",
    "Block",
    "Document",
    "Failure",
    "Passage",
    "Survey",
    "find_files",
    "place",
    "read_documents",
    "read_file",
    "read_json_lines",
    "split_passages",
    "survey",
]
