"""`llamory eval perplexity`: whether what a model has read makes the end of a long document more likely."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamory.cli import eval_options as shared
from llamory.cli.output import Json, Quiet, print_json, working
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.perplexity import LongText, Score
    from llamory.evaluation.results import Record

_JSON_FILE, _PICTURE = "perplexity.json", "perplexity.png"
_MEMORY = "0,2k,4k,8k,16k,32k,64k"


def perplexity(
    model_argument: shared.ModelArgument = None,
    model: shared.Model = None,
    documents: Annotated[
        list[Path] | None, typer.Option(help="File or folder of long documents; repeatable.  [required]")
    ] = None,
    compare: shared.Compare = None,
    memory: Annotated[
        list[str] | None, typer.Option(help=f"Tokens in memory, k is 1024.  [default: {_MEMORY}]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How many of a document's last tokens are scored.")] = 256,
    local: Annotated[
        int, typer.Option(min=1, help="Tokens before the scored ones that stay in the local context.")
    ] = 1,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Read each window by itself, once for all lengths, and mount them together."),
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
    mem_log_scale: shared.MemLogScale = None,
    mem_log_bias: shared.MemLogBias = None,
    bf16: shared.Bf16 = False,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON_FILE} and {_PICTURE}; a run that was stopped goes on in it.")
    ] = Path("perplexity"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the last tokens of long documents as memory of what stands before them grows.

    Only documents that are long enough for the longest memory are taken, and the same tokens are scored at every
    length. Every memory is read anew, by itself; with --apart every window.
    """
    names = shared.model_names(model_argument, model, compare)
    if not documents:
        raise LlamoryError("--documents is missing: name a file or folder of long documents.")
    memories = shared.token_counts(memory or [_MEMORY], "--memory")
    told = shared.memory_settings(
        mem_layers,
        context_length,
        mem_search,
        mem_top_k,
        mem_log_scale=mem_log_scale,
        mem_log_bias=mem_log_bias,
        bf16=bf16,
    )
    with working(quiet=quiet):
        from llamory.evaluation.perplexity import Score, check_window, perplexity_curve, run_perplexity
        from llamory.evaluation.results import Record

        if context_length is not None:
            check_window(tokens, local, context_length)
        texts = _texts(names, documents, max(memories) + tokens + local, limit=limit, text_field=text_field)
        settings: dict[str, Any] = {"files": shared.identity(documents), "tokens": tokens, "local": local}
        settings |= {"windows": "apart"} if apart else {}
        settings["documents"] = [text.source for text in texts]
        record = Record(shared.output_folder(output) / _JSON_FILE, "perplexity", settings, Score, perplexity_curve)
        from llamory.longllama.loading import load_long_model

        shown = shared.shown_names(names)
        for name in names:
            long = load_long_model(name, **told)
            run_perplexity(
                long,
                texts,
                memories,
                tokens=tokens,
                local=local,
                apart=apart,
                scores=record.run(name, shared.memory_facts(long)),
                on_score=lambda _: record.write(),
                title=shown[name],
            )
            del long  # both at once may be too much
        record.write()
        _draw(record, output / _PICTURE, tokens)
    if as_json:
        print_json(record.document())
    else:
        _print_tables(record, tokens)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _texts(names: list[str], data: list[Path], length: int, *, limit: int | None, text_field: str) -> list[LongText]:
    """The documents' ends as tokens, which must be the same tokens for all models."""
    from llamory.evaluation.perplexity import read_long_texts
    from llamory.models.base import load_tokenizer

    texts: list[LongText] | None = None
    for name in names:
        found = read_long_texts(data, load_tokenizer(name), length, limit=limit, text_field=text_field)
        if texts is not None and found != texts:
            raise LlamoryError(
                f"The model {name} has another tokenizer than {names[0]}, so their perplexities can't be compared; "
                "score them one by one."
            )
        texts = found
    assert texts is not None
    return texts


def _draw(record: Record[Score], path: Path, tokens: int) -> None:
    from llamory.evaluation.curves import Line, draw_curves

    shown = shared.shown_names(record.scores)
    curves = {shown[name]: record.curve(name) for name in record.scores}
    # No error bars: documents differ much more from each other than a document from itself with another memory.
    lines = [
        Line(name, [point.memory for point in curve], [point.perplexity for point in curve])
        for name, curve in curves.items()
    ]
    title = f"The last {tokens} tokens of long documents"
    draw_curves(path, title, lines, x_label="Tokens in memory", y_label="Perplexity")


def _print_tables(record: Record[Score], tokens: int) -> None:
    shown = shared.shown_names(record.scores)
    for name in record.scores:
        curve = record.curve(name)
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
