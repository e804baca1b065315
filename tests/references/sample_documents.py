"""Small documents of every format, and tokenizers to chunk them with."""

import io
from pathlib import Path

from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llamory.documents import Document, read_documents


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the bees in the hive make honey and the rain falls in the hills. " * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word and every punctuation mark is one (unknown) token, so tokens can be counted by hand."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES, WORDS = byte_tokenizer(300), word_tokenizer()


def read(path: Path, text: str | bytes, **settings: object) -> list[Document]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_documents(path, **settings))


def parts(document: Document) -> list[tuple[str, int]]:
    return [(section.title, section.line) for section in document.sections]


def pdf(pages: list[list[str]], outline: dict[str, int], title: str = "") -> bytes:
    """A PDF file that draws lines of text."""
    writer = PdfWriter()
    font = DictionaryObject({NameObject(f"/{key}"): NameObject(f"/{value}") for key, value in FONT.items()})
    for lines in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F"): font})}
        )
        stream = DecodedStreamObject()
        drawn = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
        stream.set_data(f"BT /F 12 Tf 20 250 Td {drawn}ET".encode())
        page[NameObject("/Contents")] = stream
    for heading, page_number in outline.items():
        writer.add_outline_item(heading, page_number)
    if title:
        writer.add_metadata({"/Title": title})
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


FONT = {"Type": "Font", "Subtype": "Type1", "BaseFont": "Helvetica", "Encoding": "WinAnsiEncoding"}
