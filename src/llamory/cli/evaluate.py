"""`llamory eval`: measures what a model does with long texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llamory.cli.output import Json, Quiet, print_json, working
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llamory.evaluation.passkey import PasskeyResult
    from llamory.evaluation.reports import PasskeyReport

app = typer.Typer(help="Measure what a model does with long texts.", rich_markup_mode=None)

_TITLES = {"memory": "With memory", "baseline": "Plain model, full cache"}
_JSON_FILE, _PICTURE = "passkey.json", "passkey.png"


@app.callback()
def _eval() -> None:
    pass


@app.command()
def passkey(
    model_argument: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A LLaMA: folder, .gguf file, hub id or 'default'.  [default: default]", show_default=False),
    ] = None,
    lengths: Annotated[
        list[str], typer.Option(help="Lengths of the prompts in tokens, such as 2048,16k (k is 1024).")
    ] = ["1024,2048,4096,8192"],  # noqa: B006 (typer makes a new list for every call)
    depths: Annotated[
        list[str], typer.Option(help="How many depths, evenly spaced from 0 to 1, or a list such as 0,0.5,1.")
    ] = ["5"],  # noqa: B006
    trials: Annotated[int, typer.Option(min=1, help="Prompts per length and depth.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the keys.")] = 0,
    mem_layers: Annotated[
        list[str] | None,
        typer.Option(help="Layers with memory, such as 6,12,18; the model's own if not given.", show_default=False),
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a window; the model's own if not given.", show_default=False)
    ] = None,
    last_context_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the prompt's end that are never put into memory.", show_default=False),
    ] = None,
    mem_search: Annotated[
        str | None, typer.Option(help="How memory is searched: exact, pages or faiss.", show_default=False)
    ] = None,
    mem_top_k: Annotated[
        int | None, typer.Option(min=1, help="Pages or neighbours that a search reads.", show_default=False)
    ] = None,
    haystack: Annotated[
        list[Path] | None,
        typer.Option(help="File or folder whose text hides the needle, instead of the published one; repeatable."),
    ] = None,
    needle: Annotated[
        str | None, typer.Option(help="What is hidden instead of the published sentence, with {key} for the number.")
    ] = None,
    question: Annotated[
        str | None, typer.Option(help="What is asked; of a needle of your own, if not given, its words up to {key}.")
    ] = None,
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

    The published prompts (Mohtashami & Jaggi 2023), or ones of your own text and needle.
    """
    if model is not None and model_argument not in (None, model):
        raise LlamoryError(f"Two models were named, {model_argument} and {model}; give one.")
    name = model or model_argument or "default"
    tokens = _entries(lengths, _length, "--lengths")
    places = _depths(depths)
    layers = None if mem_layers is None else _entries(mem_layers, int, "--mem-layers")
    with working(quiet=quiet):
        from llamory.backbone import load_model, load_tokenizer
        from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, read_haystack
        from llamory.evaluation.passkey import LARGEST_KEY, Needle, build_prompt, check_depth, run_passkey
        from llamory.evaluation.reports import PasskeyReport

        for depth in places:
            check_depth(depth)
        hidden = Needle(question=question) if needle is None else Needle(needle, question)
        hay = read_haystack(haystack, max(tokens)) if haystack else PUBLISHED_HAYSTACK
        tokenizer = load_tokenizer(name)
        # The shortest prompt is tried before the model is loaded, which takes longer.
        build_prompt(tokenizer, min(tokens), places[0], str(LARGEST_KEY), needle=hidden, haystack=hay)
        settings = {"model": name, "needle": hidden.text, "question": hidden.asked, "trials": trials, "seed": seed}
        settings["haystack"] = _identity(haystack) if haystack else "published"
        report = PasskeyReport(_folder(output) / _JSON_FILE, settings)

        def run(kind: str, asked: PreTrainedModel, facts: dict[str, Any], options: dict[str, Any]) -> None:
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
                result=result,
                on_cell=lambda _: report.write(),
                title=_TITLES[kind],
                generate=options,
            )

        from llamory.longllama.loading import load_long_model

        told: dict[str, Any] = {"mem_layers": layers, "context_length": context_length, "mem_search": mem_search}
        if mem_top_k is not None:
            told["mem_top_k"] = mem_top_k
        long = load_long_model(name, **told)
        device, dtype = long.device, long.dtype
        options = {} if last_context_length is None else {"last_context_length": last_context_length}
        run("memory", long, _facts(long) | options, options)
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


def _entries(given: Sequence[str], parse: Callable[[str], Any], flag: str) -> list[Any]:
    """The entries of a flag that was given once with commas, or several times, or both."""
    texts = [text.strip() for texts in given for text in texts.split(",") if text.strip()]
    try:
        return [parse(text) for text in texts] or _refuse(flag, ",".join(given))
    except ValueError as error:
        raise LlamoryError(f"{flag} must be numbers with commas between them, not {','.join(given)!r}.") from error


def _refuse(flag: str, text: str) -> list[Any]:
    raise ValueError(f"{flag}: {text}")


def _length(text: str) -> int:
    """A number of tokens; 16k is 16 * 1024."""
    return int(text[:-1]) * 1024 if text[-1:] in "kK" else int(text)


def _depths(given: Sequence[str]) -> list[float]:
    """Depths from a list of them, or from their number."""
    if len(given) == 1 and given[0].strip().isdigit():
        count = int(given[0])
        if count < 1:
            raise LlamoryError("--depths 0 asks for no depth at all; write 0.0 for the depth 0.")
        return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]
    depths = _entries(given, float, "--depths")
    if any(math.isnan(depth) for depth in depths):
        raise LlamoryError("--depths must be numbers from 0 to 1.")
    return depths


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise LlamoryError(f"{path} is a file; give a folder as --output.")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _identity(paths: Sequence[Path]) -> dict[str, Any]:
    """Names and content of the haystack's files: results of another text can't be gone on with."""
    import hashlib

    from llamory.documents import find_files

    digest, files = hashlib.sha256(), find_files(paths)
    for path in files:
        digest.update(path.read_bytes())
    return {"files": [path.name for path in files[:10]], "sha256": digest.hexdigest()}


# ---- results ---------------------------------------------------------------------------------------------------------


def _facts(model: Any) -> dict[str, Any]:
    """What of a model with memory its answers depend on."""
    config = model.config
    return {
        "fingerprint": model.memory_fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context_length": config.max_position_embeddings,
        "last_context_length": config.last_context_length,
        "mem_layers": list(config.mem_layers),
        "mem_dtype": config.mem_dtype,
        "mem_search": config.mem_search,
        "mem_top_k": config.mem_top_k,
    }


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
