"""`llamory eval retrieval`: how well models, and BM25 beside them, find what answers a query."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.retrieval import RetrievalResultsFile


def retrieval(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A BEIR folder, or the name of an mteb retrieval task.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A retriever: 'default', a LLARA checkpoint, a Sentence Transformers folder or a hub id; repeatable.",
            show_default=False,
        ),
    ] = None,
    mean_pooling: Annotated[
        list[str] | None,
        typer.Option(
            help="A LLaMA that wasn't trained to embed, by the mean of its last hidden states ('default' for the "
            "packaged base model); repeatable.",
            show_default=False,
        ),
    ] = None,
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="Score BM25 on the same queries, too.")] = True,
    split: Annotated[
        str | None, typer.Option(help="Which qrels: qrels/SPLIT.tsv.  [default: test]", show_default=False)
    ] = None,
    num_queries: Annotated[
        int | None, typer.Option(min=1, help="Ask so many of the queries only, drawn by hash.", show_default=False)
    ] = None,
    num_documents: Annotated[
        int | None,
        typer.Option(min=1, help="Search so many documents only: all relevant ones among them.", show_default=False),
    ] = None,
    ignore_identical_ids: Annotated[
        bool,
        typer.Option(
            "--ignore-identical-ids",
            help="Pass over a document that has the query's id, as BEIR does; by default only if it is the same text.",
        ),
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that a model reads of a text.", show_default=False)
    ] = None,
    query_prompt: Annotated[
        str | None,
        typer.Option(help="Prompt that LLARA models give queries: prediction or summary.", show_default=False),
    ] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Embed in bfloat16: faster, a little less exact.")] = False,
    per_query: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a JSON line per query and model here.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for retrieval.json and queries.jsonl; a run that was stopped goes on in it.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score retrievers side by side with BM25: nDCG@10, MRR@10 and Recall@100, with 95% bootstrap intervals."""
    names, mean_pooling_models = _model_names(model), _model_names(mean_pooling)
    if not names and not mean_pooling_models and not bm25:
        raise LlamoryError("There is nothing to score: name a --model, or leave --no-bm25 out.")
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
            output=None if output is None else output,
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


def _model_names(models: list[str] | None) -> list[str]:
    names = models or []
    for name in names:
        if names.count(name) > 1:
            raise LlamoryError(f"The model {name} was named twice; compare it with another one.")
    return names


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
        console.print(f"{missing:,} relevant documents aren't among them: no one can find those.", soft_wrap=True)
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
