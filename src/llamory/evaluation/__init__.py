"""Evaluations of memory and retrieval.

A new evaluation is one module with a `ResultsFile` and a function `evaluate`, and a line in this table.
"""

EVALUATIONS = {
    "passkey": "llamory.evaluation.passkey",
    "perplexity": "llamory.evaluation.perplexity",
    "lookup": "llamory.evaluation.lookup",
    "manyshot": "llamory.evaluation.manyshot",
    "retrieval": "llamory.evaluation.retrieval",
}
"""For each evaluation, its module."""
