"""A LLARA checkpoint as an embedding model in the format of Sentence Transformers."""
