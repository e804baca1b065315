"""`llamory eval manyshot`: whether more demonstrations in memory make better answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.manyshot import Trial
    from llamory.evaluation.results import ResultsFile

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
        from llamory.evaluation.manyshot import Trial, manyshot_curve, run_manyshot
        from llamory.evaluation.prompt_templates import PromptTemplate, build_manyshot_prompts, label_set, read_examples
        from llamory.evaluation.results import ResultsFile
        from llamory.models.base import load_tokenizer

        fields = {"text_field": text_field, "label_field": label_field}
        demonstration_examples = read_examples(train, **fields)
        question_examples = None if test is None else read_examples(test, **fields)
        labels = label_set(demonstration_examples, question_examples)
        template = template.replace(r"\n", "\n")
        templates_by_model = {name: PromptTemplate(load_tokenizer(name), template) for name in names}
        # All prompts are made before a model is loaded, which takes longer.
        prompts = {
            name: build_manyshot_prompts(
                prompt_template,
                demonstration_examples,
                tokens,
                range(num_seeds),
                test=question_examples,
                questions=num_questions,
            )
            for name, prompt_template in templates_by_model.items()
        }
        settings: dict[str, Any] = {"train": shared.file_identity([train])}
        settings["test"] = None if test is None else shared.file_identity([test])
        settings |= {
            **fields,
            "labels": labels,
            "questions": num_questions,
            "template": template,
            "measure": score_type,
        }
        results = ResultsFile(shared.output_folder(output) / _JSON_FILE, "manyshot", settings, Trial, manyshot_curve)
        from llamory.longllama.loading import load_long_model

        shown = shared.display_names(names)
        for name in names:
            long = load_long_model(name, **model_kwargs)
            run_manyshot(
                long,
                templates_by_model[name],
                prompts[name],
                labels,
                score_type=score_type,
                trials=results.run(name, shared.memory_model_metadata(long)),
                on_trial=lambda _: results.write(),
                title=shown[name],
            )
            del long  # both at once may be too much
        results.write()
        _draw_plot(results, output / _PICTURE, train.stem, len(labels))
    if as_json:
        print_json(results.document())
    else:
        _print_tables(results, len(labels))
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


def _draw_plot(results: ResultsFile[Trial], path: Path, data: str, labels: int) -> None:
    from llamory.evaluation.curves import Line, draw_curves

    shown = shared.display_names(results.scores)
    lines = []
    for name in results.scores:
        curve = results.curve(name)
        error_bars = None if curve[0].deviation is None else [point.deviation for point in curve]
        lines.append(
            Line(shown[name], [point.length for point in curve], [point.accuracy for point in curve], error_bars)
        )
    draw_curves(
        path,
        f"{data}: answers with demonstrations in memory",
        lines,
        x_label="Tokens of demonstrations",
        y_label="Right answers",
        percent=True,
        reference_line=(f"one of {labels} labels by chance", 1 / labels),
    )


def _print_tables(results: ResultsFile[Trial], labels: int) -> None:
    shown = shared.display_names(results.scores)
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
