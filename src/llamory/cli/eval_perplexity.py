"""`llamory eval perplexity`: whether what a model has read makes the end of a long document more likely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.perplexity import PerplexityResultsFile

_JSON_FILE, _PICTURE = "perplexity.json", "perplexity.png"
_MEMORY = "0,2k,4k,8k,16k,32k,64k"


def perplexity(
    model_argument: shared.ModelArgument = None,
    model: shared.Model = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="File or folder of long documents; repeatable.  [required]")
    ] = None,
    compare: shared.Compare = None,
    memory_tokens: Annotated[
        list[str] | None, typer.Option(help=f"Tokens in memory, k is 1024.  [default: {_MEMORY}]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many of a document's last tokens are scored.")] = 256,
    local: Annotated[
        int, typer.Option(min=1, help="Tokens before the scored ones that stay in the local context.")
    ] = 1,
    independent_windows: Annotated[
        bool,
        typer.Option(
            "--independent-windows", help="Read each window by itself, once for all lengths, and attach them together."
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="The most documents, the first ones long enough; all if not given.", show_default=False
        ),
    ] = None,
    text_field: Annotated[str, typer.Option(help="The entry of a JSON line that holds the text.")] = "text",
    mem_layers: shared.MemLayers = None,
    context_length: shared.ContextLength = None,
    mem_search: shared.MemSearch = None,
    mem_top_k: shared.MemTopK = None,
    logn_attention_scale: shared.LognAttentionScale = None,
    memory_size_bias: shared.MemorySizeBias = None,
    bf16: shared.Bf16 = False,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON_FILE} and {_PICTURE}; a run that was stopped goes on in it.")
    ] = Path("perplexity"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the last tokens of long documents as memory of what stands before them grows.

    Only documents that are long enough for the longest memory are taken, and the same tokens are scored at every
    length. Every memory is read anew, by itself; with --independent-windows every window.
    """
    names = shared.model_names(model_argument, model, compare)
    if not data:
        raise LlamoryError("--data is missing: name a file or folder of long documents.")
    memories = shared.token_counts(memory_tokens or [_MEMORY], "--memory-tokens")
    model_kwargs = shared.long_model_kwargs(
        mem_layers,
        context_length,
        mem_search,
        mem_top_k,
        logn_attention_scale=logn_attention_scale,
        memory_size_bias=memory_size_bias,
        bf16=bf16,
    )
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import perplexity as evaluation

        results = evaluation.evaluate(
            names,
            data,
            memories,
            output,
            tokens=tokens,
            local=local,
            independent_windows=independent_windows,
            limit=limit,
            text_field=text_field,
            model_kwargs=model_kwargs,
        )
    if as_json:
        print_json(results.document())
    else:
        _print_tables(results, tokens)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _print_tables(results: PerplexityResultsFile, tokens: int) -> None:
    from llamory.evaluation.results import display_names

    shown = display_names(results.scores)
    for name in results.scores:
        curve = results.curve(name)
        count = curve[0].documents
        typer.echo(f"{shown[name]}: the last {tokens} tokens of {count} document{'' if count == 1 else 's'}")
        rows = [
            [
                f"{point.memory:,}",
                f"{point.perplexity:.3f}",
                _number(point.loss),
                _number(point.standard_error),
                _number(point.change, sign="+"),
                _number(point.change_standard_error),
            ]
            for point in curve
        ]
        shared.print_table(["memory", "perplexity", "loss", "±", "change", "±"], rows)
        typer.echo()
    typer.echo("± is the standard error over documents; change is the loss less that without memory.")


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
