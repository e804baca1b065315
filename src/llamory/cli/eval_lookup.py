"""`llamory eval lookup`: the dictionary task's accuracy as memory fills with other documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.lookup import LookupResultsFile

_JSON_FILE, _PICTURE = "lookup.json", "lookup.png"
_MEMORY = "4k,16k,64k,256k,1M,4M,16M"
_TOP_K = 32  # the paper's number of neighbours


def lookup(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model that `llamory train lookup` has made.", show_default=False)
    ] = None,
    compare: shared.Compare = None,
    memory_tokens: Annotated[
        list[str] | None,
        typer.Option(help=f"Tokens in memory, k is 1024 and M is 1024 k.  [default: {_MEMORY}]", show_default=False),
    ] = None,
    num_documents: Annotated[int, typer.Option(min=1, help="Documents that are asked about.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the documents.")] = 0,
    mem_search: Annotated[str, typer.Option(help="How memory is searched: faiss, or exact for a full scan.")] = "faiss",
    mem_top_k: Annotated[int, typer.Option(min=1, help="Neighbours that each query reads per head.")] = _TOP_K,
    mem_dtype: Annotated[
        str | None, typer.Option(help="How memory is kept; the model's own if not given.", show_default=False)
    ] = None,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON_FILE} and {_PICTURE}; a run that was stopped goes on in it.")
    ] = Path("lookup"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a few dictionaries for the values of their keys while more and more others are in memory.

    As in the paper (Tworkowski et al. 2023, section 4.1): a query reads the best neighbours per head and nothing else.
    """
    if model is None and model_argument is None:
        raise LlamoryError("Name a model that `llamory train lookup` has made.")
    names = shared.model_names(model_argument, model, compare)
    lengths = shared.token_counts(memory_tokens or [_MEMORY], "--memory-tokens")
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import lookup as evaluation

        results = evaluation.evaluate(
            names,
            lengths,
            output,
            documents=num_documents,
            seed=seed,
            model_kwargs={"mem_search": mem_search, "mem_top_k": mem_top_k, "mem_dtype": mem_dtype},
        )
    if as_json:
        print_json(results.document())
    else:
        _print_tables(results)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _print_tables(results: LookupResultsFile) -> None:
    from llamory.evaluation.results import display_names

    shown = display_names(results.scores)
    for name, cells in results.scores.items():
        typer.echo(f"{shown[name]}: {cells[0].num_values if cells else 0} values asked for")
        rows = [
            [
                f"{cell.tokens:,}",
                f"{cell.accuracy:.1%}",
                f"{cell.value_accuracy:.1%}",
                f"{cell.encode_seconds:.0f}",
                f"{cell.query_seconds:.0f}",
            ]
            for cell in cells
        ]
        shared.print_table(["memory", "tokens right", "values right", "reading, s", "asking, s"], rows)
        typer.echo()
