"""`llamory eval manyshot`: whether more demonstrations in memory make better answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.manyshot import ManyshotResultsFile

_JSON_FILE, _PICTURE = "manyshot.json", "manyshot.png"


def manyshot(
    model_argument: shared.ModelArgument = None,
    model: shared.Model = None,
    train: Annotated[
        Path | None,
        typer.Option(help="JSON lines file that demonstrations are drawn from.  [required]", show_default=False),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines file that questions are drawn from; if not given, --train is split.", show_default=False
        ),
    ] = None,
    compare: shared.Compare = None,
    lengths: Annotated[
        list[str], typer.Option(help="Tokens that demonstrations may fill, such as 0,2k,16k (k is 1024).")
    ] = ["2k,4k,8k,16k"],  # noqa: B006 (typer makes a new list for every call)
    num_seeds: Annotated[int, typer.Option(min=1, help="How many draws of demonstrations and questions.")] = 3,
    num_questions: Annotated[int, typer.Option(min=1, help="Questions per length and seed.")] = 100,
    text_field: Annotated[str, typer.Option(help="The entry of a line that holds the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="The entry of a line that holds the label.")] = "label",
    template: Annotated[
        str, typer.Option(help=r"How a demonstration is worded; \n is a new line.")
    ] = r"{text}\n{label}\n\n",
    score_type: Annotated[
        Literal["mean", "sum"],
        typer.Option(
            help="What makes a label likely: its tokens' mean log-probability, or their sum, which doesn't favour "
            "labels of many tokens."
        ),
    ] = "mean",
    mem_layers: shared.MemLayers = None,
    context_length: shared.ContextLength = None,
    mem_search: shared.MemSearch = None,
    mem_top_k: shared.MemTopK = None,
    logn_attention_scale: shared.LognAttentionScale = None,
    memory_size_bias: shared.MemorySizeBias = None,
    bf16: shared.Bf16 = False,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON_FILE} and {_PICTURE}; a run that was stopped goes on in it.")
    ] = Path("manyshot"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Classify texts with as many demonstrations in memory as fit some lengths.

    Demonstrations are drawn at random for every seed; the answer is the label whose tokens the model finds likeliest
    after the question.
    """
    names = shared.model_names(model_argument, model, compare)
    if train is None:
        raise LlamoryError("--train is missing: name a JSON lines file of labelled texts.")
    tokens = shared.token_counts(lengths, "--lengths")
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
        from llamory.evaluation import manyshot as evaluation

        results = evaluation.evaluate(
            names,
            train,
            tokens,
            output,
            test=test,
            seeds=num_seeds,
            questions=num_questions,
            text_field=text_field,
            label_field=label_field,
            template=template.replace(r"\n", "\n"),
            score_type=score_type,
            model_kwargs=model_kwargs,
        )
    if as_json:
        print_json(results.document())
    else:
        _print_tables(results)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _print_tables(results: ManyshotResultsFile) -> None:
    from llamory.evaluation.results import display_names

    shown, labels = display_names(results.scores), len(results.settings["labels"])
    for name in results.scores:
        curve = results.curve(name)
        count = curve[0].seeds
        typer.echo(f"{shown[name]}: {labels} labels, {count} seed{'' if count == 1 else 's'}")
        rows = [
            [
                f"{point.length:,}",
                f"{point.demonstrations:,.1f}",
                f"{point.accuracy:.1%}",
                "-" if point.deviation is None else f"{point.deviation:.1%}",
            ]
            for point in curve
        ]
        shared.print_table(["tokens", "demonstrations", "right", "±"], rows)
        typer.echo()
    typer.echo("± is the standard deviation between seeds.")
