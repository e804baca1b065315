"""`llamory eval manyshot`: whether more demonstrations in memory make better answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import eval_options as shared
from llamory.cli.output import Json, Quiet, print_json, working
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.manyshot import Trial
    from llamory.evaluation.results import Record

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
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of demonstrations and questions.")] = 3,
    questions: Annotated[int, typer.Option(min=1, help="Questions per length and seed.")] = 100,
    text_field: Annotated[str, typer.Option(help="The entry of a line that holds the text.")] = "text",
    label_field: Annotated[str, typer.Option(help="The entry of a line that holds the label.")] = "label",
    template: Annotated[
        str, typer.Option(help=r"How a demonstration is worded; \n is a new line.")
    ] = r"{text}\n{label}\n\n",
    measure: Annotated[
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
    mem_log_scale: shared.MemLogScale = None,
    mem_log_bias: shared.MemLogBias = None,
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
        from llamory.evaluation.manyshot import Trial, manyshot_curve, run_manyshot
        from llamory.evaluation.prompt_templates import Wording, label_set, plan_manyshot, read_examples
        from llamory.evaluation.results import Record
        from llamory.models.base import load_tokenizer

        fields = {"text_field": text_field, "label_field": label_field}
        shown_examples = read_examples(train, **fields)
        asked_examples = None if test is None else read_examples(test, **fields)
        labels = label_set(shown_examples, asked_examples)
        template = template.replace(r"\n", "\n")
        wordings = {name: Wording(load_tokenizer(name), template) for name in names}
        # All prompts are made before a model is loaded, which takes longer.
        plans = {
            name: plan_manyshot(wording, shown_examples, tokens, range(seeds), test=asked_examples, questions=questions)
            for name, wording in wordings.items()
        }
        settings: dict[str, Any] = {"train": shared.identity([train])}
        settings["test"] = None if test is None else shared.identity([test])
        settings |= {**fields, "labels": labels, "questions": questions, "template": template, "measure": measure}
        record = Record(shared.output_folder(output) / _JSON_FILE, "manyshot", settings, Trial, manyshot_curve)
        from llamory.longllama.loading import load_long_model

        shown = shared.shown_names(names)
        for name in names:
            long = load_long_model(name, **told)
            run_manyshot(
                long,
                wordings[name],
                plans[name],
                labels,
                measure=measure,
                trials=record.run(name, shared.memory_facts(long)),
                on_trial=lambda _: record.write(),
                title=shown[name],
            )
            del long  # both at once may be too much
        record.write()
        _draw(record, output / _PICTURE, train.stem, len(labels))
    if as_json:
        print_json(record.document())
    else:
        _print_tables(record, len(labels))
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _draw(record: Record[Trial], path: Path, data: str, labels: int) -> None:
    from llamory.evaluation.curves import Line, draw_curves

    shown = shared.shown_names(record.scores)
    lines = []
    for name in record.scores:
        curve = record.curve(name)
        spreads = None if curve[0].deviation is None else [point.deviation for point in curve]
        lines.append(Line(shown[name], [point.length for point in curve], [point.accuracy for point in curve], spreads))
    draw_curves(
        path,
        f"{data}: answers with demonstrations in memory",
        lines,
        x_label="Tokens of demonstrations",
        y_label="Right answers",
        share=True,
        level=(f"one of {labels} labels by chance", 1 / labels),
    )


def _print_tables(record: Record[Trial], labels: int) -> None:
    shown = shared.shown_names(record.scores)
    for name in record.scores:
        curve = record.curve(name)
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
