"""`llamory eval passkey`: hides a number, or another secret, in long prompts and sees whether the model finds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamory.cli import eval_options as shared
from llamory.cli.options import Json, Quiet
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError
from llamory.evaluation.haystack import Kind, Needle

if TYPE_CHECKING:
    from llamory.evaluation.passkey import PasskeyResult, PasskeyResultsFile

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
    mem_top_k_attention: shared.MemTopKAttention = False,
    logn_attention_scale: shared.LognAttentionScale = None,
    memory_size_bias: shared.MemorySizeBias = None,
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
    independent_documents: Annotated[
        bool,
        typer.Option(
            "--independent-documents",
            help="Read each window by itself, once for all prompts, and attach them together.",
        ),
    ] = False,
    evidence_ratio: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="With --independent-documents: leave out windows that make the question so many times less likely than the best does, "
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
    tokens = shared.parse_list(lengths, shared.token_count, "--lengths")
    depth_values = _depths(depths)
    model_kwargs = shared.long_model_kwargs(
        mem_layers,
        context_length,
        mem_search,
        mem_top_k,
        mem_top_k_attention=mem_top_k_attention,
        logn_attention_scale=logn_attention_scale,
        memory_size_bias=memory_size_bias,
        bf16=bf16,
    )
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import passkey as evaluation

        results = evaluation.evaluate(
            name,
            tokens,
            depth_values,
            output,
            trials=trials,
            seed=seed,
            needle=Needle.of(key, needle, question),
            haystack=haystack,
            independent_documents=independent_documents,
            evidence_ratio=evidence_ratio,
            last_context_length=last_context_length,
            baseline=baseline,
            model_kwargs=model_kwargs,
        )
    if as_json:
        print_json(results.document())
    else:
        _print_tables(results, evaluation.TITLES)
        typer.echo(f"Written: {output / _JSON_FILE} and {output / _PICTURE}")


# ---- options ---------------------------------------------------------------------------------------------------------


def _depths(given: Sequence[str]) -> list[float]:
    """Depths from a list of them, or from their number."""
    if len(given) == 1 and given[0].strip().isdigit():
        count = int(given[0])
        if count < 1:
            raise LlamoryError("--depths 0 asks for no depth at all; write 0.0 for the depth 0.")
        return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]
    depths = shared.parse_list(given, float, "--depths")
    if any(math.isnan(depth) for depth in depths):
        raise LlamoryError("--depths must be numbers from 0 to 1.")
    return depths


# ---- results ---------------------------------------------------------------------------------------------------------


def _print_tables(results: PasskeyResultsFile, titles: Mapping[str, str]) -> None:
    for kind, result in results.results.items():
        context = results.metadata[kind].get("context_length")
        typer.echo(f"{titles.get(kind, kind)}: {result.accuracy:.0%} of the keys found")
        for line in _table(result, context):
            typer.echo(line)
        if result.lengths_beyond_context(context):
            typer.echo(f"* longer than the context of {context:,} tokens")
        typer.echo()


def _table(result: PasskeyResult, context: int | None) -> list[str]:
    beyond = result.lengths_beyond_context(context)
    headers = [f"{length:,}{'*' if length in beyond else ''}" for length in result.lengths]
    widths = [max(6, len(head)) + 2 for head in headers]
    lines = ["depth" + _row(headers, widths)]
    for depth in result.depths:
        cells = [result.cell(length, depth) for length in result.lengths]
        shares = ["-" if cell is None else f"{cell.accuracy:.0%}" for cell in cells]
        lines.append(f"{depth:>5.0%}" + _row(shares, widths))
    return lines


def _row(parse_list: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{entry:>{width}}" for entry, width in zip(parse_list, widths, strict=True))
