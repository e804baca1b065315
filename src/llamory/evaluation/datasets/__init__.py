"""Builders of retrieval datasets: each makes pairs of query and text, which `builder` splits and writes.

A new dataset is one module with a function that yields pairs, and a line in this table.
"""

DATASETS = {
    "descriptions": "llamory.evaluation.datasets.descriptions.description_pairs",
    "functions": "llamory.evaluation.datasets.functions.function_pairs",
    "sections": "llamory.evaluation.datasets.sections.section_pairs",
}
"""For each dataset, the function that yields its pairs."""
