"""Settings and sentences of the tests that read small documents."""

CONTEXT = 16
SETTINGS = {"mem_layers": [1], "context_length": CONTEXT, "mem_dtype": "float32"}
WORDS = "river stone bridge winter garden letter window market silver morning".split()


def sentence(start: int, words: int) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(words))
