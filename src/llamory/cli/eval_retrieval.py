"""`llamory eval retrieval`: how well models, and BM25 beside them, find what answers a query."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llamory.evaluation.qrels import RetrievalDataset
    from llamory.evaluation.retrieval_results import RetrievalResultsFile
    from llamory.evaluation.retrieval_systems import Advance, Ranking

_BM25 = "BM25"
_MEAN = "mean of {}"


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
        from llamory.embedding.pipeline import (
            check_embedder,
            is_llara,
            load_embedder,
            mean_embedder,
            set_query_prompt,
        )
        from llamory.evaluation.qrels import sample
        from llamory.evaluation.retrieval_results import RetrievalResultsFile
        from llamory.evaluation.retrieval_systems import search_bm25
        from llamory.models.base import load_config

        for name in names:
            check_embedder(name)
        for name in mean_pooling_models:
            load_config(name)
        full_dataset = _read(data, split, ignore_identical_ids=ignore_identical_ids)
        dataset = sample(full_dataset, num_queries, num_documents)
        if per_query is not None and not per_query.parent.is_dir():
            raise LlamoryError(f"There is no folder {per_query.parent} for the per-query file.")
        report = RetrievalResultsFile(dataset, None if output is None else shared.output_folder(output), per_query)
        shown = shared.display_names([*names, *mean_pooling_models])
        shown |= {_MEAN.format(name): _MEAN.format(shown[name]) for name in mean_pooling_models}
        if bm25:
            _score(report, dataset, _BM25, _bm25_facts(), lambda advance: search_bm25(dataset, advance), _BM25)
        for name in mean_pooling_models:
            embedder = mean_embedder(name, **({} if max_length is None else {"max_length": max_length}))
            _score_model(report, dataset, _MEAN.format(name), embedder, shown, bf16=bf16)
        for name in names:
            embedder = load_embedder(name, max_length=max_length)
            if query_prompt is not None and is_llara(embedder):
                set_query_prompt(embedder, query_prompt)
            _score_model(report, dataset, name, embedder, shown, bf16=bf16)
        report.finish()
    if as_json:
        print_json(report.document())
    else:
        _print(report, {_BM25: _BM25, **shown})
        written = [str(path) for path in (output, per_query) if path is not None]
        if written:
            typer.echo(f"Written: {' and '.join(written)}")


def _model_names(models: list[str] | None) -> list[str]:
    names = models or []
    for name in names:
        if names.count(name) > 1:
            raise LlamoryError(f"The model {name} was named twice; compare it with another one.")
    return names


def _read(data: str, split: str | None, *, ignore_identical_ids: bool) -> RetrievalDataset:
    from llamory.evaluation.beir import read_beir
    from llamory.evaluation.mteb_task import read_mteb

    path = Path(data)
    if path.is_dir():
        return read_beir(path, split, ignore_identical_ids=ignore_identical_ids)
    if path.exists():
        raise LlamoryError(f"{data} is a file; give a BEIR folder, or the name of an mteb task.")
    if path.name != data or data.startswith("."):
        raise LlamoryError(f"There is no folder {data}; give a BEIR folder, or the name of an mteb task.")
    return read_mteb(data, split, ignore_identical_ids=ignore_identical_ids)


def _bm25_facts() -> dict[str, Any]:
    from importlib.metadata import version

    return {"kind": "bm25", "library": f"bm25s {version('bm25s')}"}


def _score_model(
    report: RetrievalResultsFile,
    data: RetrievalDataset,
    name: str,
    embedder: SentenceTransformer,
    shown: dict[str, str],
    *,
    bf16: bool,
) -> None:
    from llamory.embedding.library_encoder import embed_passages, embed_queries, fingerprint
    from llamory.embedding.pipeline import query_prompt
    from llamory.evaluation.retrieval_systems import search_vectors

    prompt = query_prompt(embedder)
    limit = embedder.max_seq_length  # infinite where there is none, which JSON doesn't know
    metadata = {
        "kind": "vectors",
        "fingerprint": fingerprint(embedder),
        "similarity": embedder.similarity_fn_name,
        "max_length": limit if limit is not None and math.isfinite(limit) else None,
        "bf16": bf16,
    }
    if prompt is not None:
        metadata["query_prompt"] = prompt

    def search(advance: Advance) -> Ranking:
        return search_vectors(
            data,
            lambda texts: embed_queries(embedder, texts, bf16=bf16),
            lambda texts: embed_passages(embedder, texts, advance, bf16=bf16),
            embedder.similarity,
        )

    _score(report, data, name, metadata, search, shown[name])


def _score(
    report: RetrievalResultsFile,
    data: RetrievalDataset,
    name: str,
    metadata: dict[str, Any],
    search: Callable[[Advance], Ranking],
    shown: str,
) -> None:
    from llamory.evaluation.retrieval import score_queries
    from llamory.evaluation.steps import StepProgress

    if report.has(name, metadata):
        return
    started = time.perf_counter()
    with StepProgress(shown, [len(data.ids)], 1) as progress:
        scores = score_queries(data, search(progress.advance))
        seconds = time.perf_counter() - started
        report.add(name, metadata, scores, seconds)
        progress.step(0, f"nDCG@10 {report.metadata[name]['nDCG@10']:.3f} ({seconds:.1f} s)")


def _print(report: RetrievalResultsFile, shown: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from llamory.evaluation.retrieval import METRICS

    settings = report.settings
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
    for name, metadata in report.metadata.items():
        table.add_row(shown.get(name, name), *(_format_with_interval(metadata, metric, "\n") for metric in METRICS))
    console.print(table)
    for entry in report.document()["differences"]:
        one, other = (shown.get(entry[side], entry[side]) for side in ("model", "minus"))
        low, high = entry["intervals"]["nDCG@10"] or (0, 0)
        significance = "beyond" if low > 0 or high < 0 else "within"
        text = f"nDCG@10 of {one} minus {other}: {_format_with_interval(entry, 'nDCG@10', ' ', sign='+')}, {significance} chance"
        console.print(text, markup=False, soft_wrap=True)


def _format_with_interval(entry: dict[str, Any], metric: str, separator: str, *, sign: str = "") -> str:
    bounds = entry["intervals"][metric]
    value = f"{entry[metric]:{sign}.3f}"
    return value if bounds is None else f"{value}{separator}({bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f})"
