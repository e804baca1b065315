"""Embedding models whose vectors can be checked by hand: the mean of one unit vector per known word."""

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers


def keyword_model(words: list[str]) -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.vstack([np.zeros(len(words)), np.eye(len(words))]).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
