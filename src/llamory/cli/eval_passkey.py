"""`llamory eval passkey`: hides a number, or another secret, in long prompts and sees whether the model finds it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamory.cli import eval_options as shared
from llamory.cli.output import Json, Quiet, print_json, working
from llamory.errors import LlamoryError
from llamory.evaluation.secrets import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llamory.evaluation.passkey import PasskeyResult, PromptMaker
    from llamory.evaluation.passkey_results import PasskeyReport

_TITLES = {"memory": "With memory", "baseline": "Plain model, full cache"}
_JSON_FILE, _PICTURE = "passkey.json", "passkey.png"


def passkey(
    model_argument: shared.ModelArgument = None,
    model: shared.Model = None,
    lengths: Annotated[
        list[str], typer.Option(help="Lengths of the prompts in tokens, such as 2048,16k (k is 1024).")
    ] = ["1024,2048,4096,8192"],  # noqa: B006 (typer makes a new list for every call)
    depths: Annotated[
        list[str], typer.Option(help="How many depths, evenly spaced from 0 to 1, or a list such as 0,0.5,1.")
    ] = ["5"],  # noqa: B006
    trials: Annotated[int, typer.Option(min=1, help="Prompts per length and depth.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the keys.")] = 0,
    mem_layers: shared.MemLayers = None,
    context_length: shared.ContextLength = None,
    last_context_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt's end that are never put into memory.", show_default=False),
    ] = None,
    mem_search: shared.MemSearch = None,
    mem_top_k: shared.MemTopK = None,
    mem_only_top_k: shared.MemOnlyTopK = False,
    mem_log_scale: shared.MemLogScale = None,
    mem_log_bias: shared.MemLogBias = None,
    bf16: shared.Bf16 = False,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder whose text hides the needle, instead of the published one; repeatable."),
    ] = None,
    key: Annotated[Kind, typer.Option(help="What the secret is; each has its own sentence.")] = "number",
    needle: Annotated[
        str | None, typer.Option(help="What is hidden instead of the usual sentence, with {key} for the secret.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked; of a needle of your own, if not given, its words up to {key}.")
    ] = None,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="Read each window by itself, once for all prompts, and mount them together."),
    ] = False,
    focus: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="With --apart: leave out windows that make the question so many times less likely than the best does, "
            "as llamory ask does (100 there); 0 leaves none out.",
        ),
    ] = 0.0,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Ask the plain model too, without memory, even beyond its context.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help=f"Folder for {_JSON_FILE} and {_PICTURE}; a run that was stopped goes on in it.")
    ] = Path("passkey"),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hide a number at some depths of long prompts and see whether the model finds it.

    The published prompts (Mohtashami & Jaggi 2023), or ones with a name, a date or a sentence, or of your own text and
    needle.
    """
    name = shared.model_name(model_argument, model)
    tokens = shared.entries(lengths, shared.token_count, "--lengths")
    places = _depths(depths)
    told = shared.memory_settings(
        mem_layers,
        context_length,
        mem_search,
        mem_top_k,
        mem_only_top_k=mem_only_top_k,
        mem_log_scale=mem_log_scale,
        mem_log_bias=mem_log_bias,
        bf16=bf16,
    )
    with working(quiet=quiet):
        from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, read_haystack
        from llamory.evaluation.passkey import Needle, build_prompt, check_depth, run_passkey
        from llamory.evaluation.passkey_results import PasskeyReport
        from llamory.evaluation.secrets import longest
        from llamory.models.base import load_model, load_tokenizer
        from llamory.qa.evidence import check_focus

        if apart and baseline:
            raise LlamoryError("The plain model has no memory to mount windows in; leave out --apart or --baseline.")
        if apart and last_context_length is not None:
            raise LlamoryError("With --apart only the question isn't in memory; leave out --last-context-length.")
        check_focus(focus)
        if focus and not apart:
            raise LlamoryError("Windows are left out only where they are read by themselves; add --apart to --focus.")
        for depth in places:
            check_depth(depth)
        hidden = Needle.of(key, needle, question)
        hay = read_haystack(haystack, max(tokens)) if haystack else PUBLISHED_HAYSTACK
        tokenizer = load_tokenizer(name)
        # The shortest prompt is tried before the model is loaded, which takes longer.
        build_prompt(tokenizer, min(tokens), places[0], longest(key), needle=hidden, haystack=hay)
        settings = {"model": name, "needle": hidden.text, "question": hidden.asked, "trials": trials, "seed": seed}
        settings |= {"key": key} if key != "number" else {}
        settings |= {"windows": "apart"} if apart else {}
        settings |= {"focus": focus} if focus else {}
        settings["haystack"] = shared.identity(haystack) if haystack else "published"
        report = PasskeyReport(shared.output_folder(output) / _JSON_FILE, settings)

        def run(
            kind: str,
            asked: PreTrainedModel,
            facts: dict[str, Any],
            options: dict[str, Any],
            prompts: PromptMaker | None = None,
        ) -> None:
            result = report.result(kind, facts)
            run_passkey(
                asked,
                tokenizer,
                tokens,
                places,
                trials=trials,
                seed=seed,
                needle=hidden,
                haystack=hay,
                prompts=prompts,
                result=result,
                on_cell=lambda _: report.write(),
                title=_TITLES[kind],
                generate=options,
            )

        from llamory.longllama.loading import load_long_model

        long = load_long_model(name, **told)
        device, dtype = long.device, long.dtype
        options = {} if last_context_length is None else {"last_context_length": last_context_length}
        mounted = None
        if apart:
            from llamory.evaluation.loaded_documents import MountedPrompts

            mounted = MountedPrompts(long, tokenizer, needle=hidden, haystack=hay, focus=focus)
        run("memory", long, shared.memory_facts(long) | options, options, mounted)
        if baseline:
            del long  # both at once may be too much
            plain = load_model(name, dtype=dtype).to(device)
            facts = {"context_length": plain.config.max_position_embeddings, "dtype": str(dtype).removeprefix("torch.")}
            run("baseline", plain, facts, {})
        report.write()
        _draw(report, name, output / _PICTURE)
    if as_json:
        print_json(report.document())
    else:
        _print_tables(report)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


# ---- options ---------------------------------------------------------------------------------------------------------


def _depths(given: Sequence[str]) -> list[float]:
    """Depths from a list of them, or from their number."""
    if len(given) == 1 and given[0].strip().isdigit():
        count = int(given[0])
        if count < 1:
            raise LlamoryError("--depths 0 asks for no depth at all; write 0.0 for the depth 0.")
        return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]
    depths = shared.entries(given, float, "--depths")
    if any(math.isnan(depth) for depth in depths):
        raise LlamoryError("--depths must be numbers from 0 to 1.")
    return depths


# ---- results ---------------------------------------------------------------------------------------------------------


def _draw(report: PasskeyReport, name: str, path: Path) -> None:
    from llamory.evaluation.plots import Panel, draw_heat_map

    panels = [
        Panel(_TITLES.get(kind, kind), result, report.facts[kind].get("context_length"))
        for kind, result in report.results.items()
    ]
    shown = Path(name).resolve().name if Path(name).exists() else name
    draw_heat_map(path, f"Passkeys found by {shown}", panels)


def _print_tables(report: PasskeyReport) -> None:
    for kind, result in report.results.items():
        context = report.facts[kind].get("context_length")
        typer.echo(f"{_TITLES.get(kind, kind)}: {result.accuracy:.0%} of the keys found")
        for line in _table(result, context):
            typer.echo(line)
        if result.lengths_beyond(context):
            typer.echo(f"* longer than the context of {context:,} tokens")
        typer.echo()


def _table(result: PasskeyResult, context: int | None) -> list[str]:
    beyond = result.lengths_beyond(context)
    heads = [f"{length:,}{'*' if length in beyond else ''}" for length in result.lengths]
    widths = [max(6, len(head)) + 2 for head in heads]
    lines = ["depth" + _row(heads, widths)]
    for depth in result.depths:
        cells = [result.cell(length, depth) for length in result.lengths]
        shares = ["-" if cell is None else f"{cell.accuracy:.0%}" for cell in cells]
        lines.append(f"{depth:>5.0%}" + _row(shares, widths))
    return lines


def _row(entries: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{entry:>{width}}" for entry, width in zip(entries, widths, strict=True))
