"""`llamory eval retrieval`: how well models, and BM25 beside them, find what answers a query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import options
from llamory.cli.options import ADVANCED, integer, option
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.retrieval import RetrievalResultsFile


def retrieval(
    data: Annotated[
        str, typer.Argument(parser=options.name, help="A BEIR folder, or the name of an mteb retrieval task.")
    ],
    model: Annotated[
        list[str] | None,
        option(
            "--model",
            options.name,
            "Retriever: 'default', a LLARA checkpoint, a Sentence Transformers folder or a hub id (repeatable).",
        ),
    ] = None,
    mean_pooling: Annotated[
        list[str] | None,
        option(
            "--mean-pooling",
            options.name,
            "LLaMA that was not trained to embed, scored by the mean of its last hidden states (repeatable).",
            metavar="MODEL",
        ),
    ] = None,
    bm25: Annotated[bool, option("--bm25/--no-bm25", None, "Also score BM25.")] = True,
    split: Annotated[
        str | None, option("--split", options.name, "Split of the qrels; test, or the only one there is, if not given.")
    ] = None,
    num_queries: Annotated[
        int | None, option("--num-queries", integer(), "Sample this many queries, by a hash.")
    ] = None,
    num_documents: Annotated[
        int | None,
        option("--num-documents", integer(), "Sample this many documents; all relevant ones are among them."),
    ] = None,
    max_length: Annotated[int | None, option("--max-length", integer(), "Tokens of a text that a model reads.")] = None,
    query_prompt: Annotated[
        Literal["prediction", "summary"] | None,
        option("--query-prompt", None, "Prompt of LLARA models for queries; the model's own if not given."),
    ] = None,
    ignore_identical_ids: Annotated[
        bool,
        option(
            "--ignore-identical-ids",
            None,
            "Skip a document with the id of the query, as BEIR does, even if its text differs.",
            ADVANCED,
        ),
    ] = False,
    bf16: options.Bf16 = False,
    per_query: Annotated[
        Path | None,
        option(
            "--per-query",
            options.path,
            "JSON lines file for the scores of each query and model.",
            options.OUTPUT,
            metavar="FILE",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option(
            "--output",
            options.path,
            "Folder for retrieval.json and queries.jsonl; a run that was interrupted resumes there.",
            options.OUTPUT,
            metavar="DIR",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Scores of retrievers and BM25: nDCG@10, MRR@10 and Recall@100, with 95% bootstrap intervals."""
    names, mean_pooling_models = options.distinct_names(model or []), options.distinct_names(mean_pooling or [])
    if not names and not mean_pooling_models and not bm25:
        raise LlamoryError("There is nothing to score: give a --model, or leave out --no-bm25.")
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import retrieval as evaluation
        from llamory.evaluation.results import display_names

        results = evaluation.evaluate(
            data,
            names,
            mean_pooling=mean_pooling_models,
            bm25=bm25,
            split=split,
            num_queries=num_queries,
            num_documents=num_documents,
            ignore_identical_ids=ignore_identical_ids,
            max_length=max_length,
            query_prompt=query_prompt,
            bf16=bf16,
            output=output,
            per_query=per_query,
        )
    if as_json:
        print_json(results.document())
    else:
        shown = display_names([*names, *mean_pooling_models])
        shown |= {
            evaluation.mean_pooling_name(name): evaluation.mean_pooling_name(shown[name])
            for name in mean_pooling_models
        }
        _print(results, shown)
        written = [str(path) for path in (output, per_query) if path is not None]
        if written:
            typer.echo(f"Written: {' and '.join(written)}")


def _print(report: RetrievalResultsFile, shown: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from llamory.evaluation.retrieval import METRICS

    settings, document = report.settings, report.document()
    title = (
        f"{settings['data']} ({settings['split']}): {settings['queries']:,} queries, "
        f"{settings['documents']:,} documents"
    )
    console = Console(highlight=False)
    console.print(title, markup=False, soft_wrap=True)
    missing = settings["relevant_documents_missing"]
    if missing:
        console.print(f"{missing:,} relevant documents are not among them and can't be found.", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")  # a path may be long
    for metric in METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, metadata in document["runs"].items():
        table.add_row(shown.get(name, name), *(_format_with_interval(metadata, metric, "\n") for metric in METRICS))
    console.print(table)
    for entry in document["differences"]:
        one, other = (shown.get(entry[side], entry[side]) for side in ("model", "minus"))
        low, high = entry["intervals"]["nDCG@10"] or (0, 0)
        significance = "beyond" if low > 0 or high < 0 else "within"
        difference = _format_with_interval(entry, "nDCG@10", " ", sign="+")
        text = f"nDCG@10 of {one} minus {other}: {difference}, {significance} chance"
        console.print(text, markup=False, soft_wrap=True)


def _format_with_interval(entry: dict[str, Any], metric: str, separator: str, *, sign: str = "") -> str:
    bounds = entry["intervals"][metric]
    value = f"{entry[metric]:{sign}.3f}"
    return value if bounds is None else f"{value}{separator}({bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f})"
