"""Documents: files of many formats as sections with titles and lines, and as chunks of bounded length."""

from llamory.documents.chunking import chunk_document
from llamory.documents.document import Chunk, Document, Section, location
from llamory.documents.formats import SUFFIXES, supported_suffixes
from llamory.documents.readers import read_documents, read_file, read_json_lines
from llamory.documents.scan import FileScan, SkippedFile, find_files, scan_files

__all__ = [
    "SUFFIXES",
    "Chunk",
    "Document",
    "FileScan",
    "Section",
    "SkippedFile",
    "chunk_document",
    "find_files",
    "location",
    "read_documents",
    "read_file",
    "read_json_lines",
    "scan_files",
    "supported_suffixes",
]
