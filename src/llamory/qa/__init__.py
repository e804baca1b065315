"""From a question to an answer with citations: evidence, generation, chat, attribution."""
