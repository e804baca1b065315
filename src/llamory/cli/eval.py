"""`llamory eval`: measures what a model does with a memory, and how well a retriever finds what answers a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import eval_retrieval, options
from llamory.cli.options import ADVANCED, explicit, integer, number, option
from llamory.cli.output import print_json, print_table, show_count, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.lookup import LookupResultsFile
    from llamory.evaluation.manyshot import ManyshotResultsFile
    from llamory.evaluation.passkey import PasskeyResult, PasskeyResultsFile
    from llamory.evaluation.perplexity import PerplexityResultsFile

app = typer.Typer(help="Evaluate memory and retrieval.", rich_markup_mode="rich")

DATA = "Data"


def _output_option(evaluation: str) -> Any:
    files = f"{evaluation}.json and {evaluation}.png"
    return option(
        "--output",
        options.path,
        f"Folder for {files}; a run that was interrupted resumes there.",
        options.OUTPUT,
        metavar="DIR",
    )


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """The model that is evaluated, and its device."""

    argument: Annotated[
        str | None, typer.Argument(parser=options.name, metavar="MODEL", help="The same as --model.")
    ] = None
    model: Annotated[
        str | None,
        option("--model", options.name, "Model: folder, .gguf file, hub id or 'default'; the default if not given."),
    ] = None
    device: options.Device = None

    @property
    def name(self) -> str:
        """The name that was given, as an argument or as an option."""
        if self.model is not None and self.argument not in (None, self.model):
            raise LlamoryError(f"Two models were named, {self.argument} and {self.model}; give one.")
        return self.model or self.argument or "default"


@dataclasses.dataclass(kw_only=True)
class ModelsOptions(ModelOptions):
    """Models that are compared."""

    compare: Annotated[
        list[str] | None,
        option("--compare", options.name, "Another model for the same task (repeatable).", metavar="MODEL"),
    ] = None

    @property
    def names(self) -> list[str]:
        """The names of all models."""
        return options.distinct_names([self.name, *(self.compare or [])])


@dataclasses.dataclass(kw_only=True)
class MemoryOptions(options.MemorySearchOptions):
    """How a model attends to its memory."""

    mem_layers: options.MemLayers = None
    context_length: options.ContextLength = None
    logn_attention_scale: Annotated[
        float | None,
        option(
            "--logn-attention-scale",
            number(),
            "How much attention sharpens with the logarithm of the size of the memory; the model's own if not given.",
            ADVANCED,
        ),
    ] = None
    memory_size_bias: Annotated[
        float | None,
        option(
            "--memory-size-bias",
            number(),
            "How much the scores of a larger memory are lowered; the model's own if not given.",
            ADVANCED,
        ),
    ] = None
    bf16: options.Bf16 = False

    def model_kwargs(self, device: str | None) -> dict[str, Any]:
        """The arguments of `load_long_model`."""
        from llamory.models.device import pick_device

        kwargs = {"mem_layers": self.mem_layers, "context_length": self.context_length, "mem_search": self.mem_search}
        kwargs |= explicit(self, "mem_top_k", "logn_attention_scale", "memory_size_bias")
        return kwargs | ({"dtype": "bfloat16"} if self.bf16 else {}) | {"device": pick_device(device)}


# ---- passkey ---------------------------------------------------------------------------------------------------------


def _depths(values: Sequence[str]) -> list[float]:
    """Depths from a list of them, or from their number."""
    if len(values) == 1 and values[0].strip().isdigit():
        count = int(values[0])
        if not 1 <= count <= 1000:
            raise typer.BadParameter(f"{count} is not a number of depths from 1 to 1000; write 0.0 for the depth 0.")
        return [0.5] if count == 1 else [round(i / (count - 1), 4) for i in range(count)]
    expected = "a number of depths, or depths from 0 to 1, such as 0,0.5,1"
    depths = options.comma_separated(values, float, expected)
    if max(depths) > 1:
        raise typer.BadParameter(f"{max(depths):g} should be {expected}.")
    return depths


def passkey(
    *,
    model: ModelOptions,
    lengths: Annotated[
        list[Any],
        option("--lengths", options.token_counts, "Lengths of the prompts; 1k is 1024 tokens.", DATA, parse_all=True),
    ] = ["1k,2k,4k,8k"],  # noqa: B006 (typer copies it)
    depths: Annotated[
        list[Any],
        option(
            "--depths",
            _depths,
            "Number of depths, evenly spaced from 0 (start) to 1 (end), or a list such as 0,0.5,1.",
            DATA,
            metavar="DEPTHS",
            parse_all=True,
        ),
    ] = ["5"],  # noqa: B006
    trials: Annotated[int, option("--trials", integer(), "Prompts per length and depth.", DATA)] = 3,
    seed: options.EvalSeed = 0,
    haystack: Annotated[
        list[Path] | None,
        option(
            "--haystack",
            options.path,
            "File or folder with the text around the needle, instead of the published text (repeatable).",
            DATA,
            metavar="PATH",
        ),
    ] = None,
    key: Annotated[
        Literal["number", "name", "date", "sentence"],
        option("--key", None, "Kind of the secret; each has its own needle and question.", DATA),
    ] = "number",
    needle: Annotated[
        str | None, option("--needle", options.text, "Sentence to hide, with {key} for the secret.", DATA)
    ] = None,
    question: Annotated[
        str | None,
        option(
            "--question",
            options.text,
            "Text that asks for the secret; the words of --needle before {key} if not given.",
            DATA,
        ),
    ] = None,
    independent_documents: Annotated[
        bool,
        option(
            "--independent-documents",
            None,
            "Encode each window by itself, as a document of a library, and attach them.",
        ),
    ] = False,
    evidence_ratio: Annotated[
        float,
        option(
            "--evidence-ratio",
            number(),
            "With --independent-documents, drop windows whose query likelihood is more than this many times below "
            "the best; 0 keeps all.",
        ),
    ] = 0.0,
    baseline: Annotated[
        bool, option("--baseline", None, "Also evaluate the plain model without memory, even beyond its context.")
    ] = False,
    memory: MemoryOptions,
    last_context_length: options.LastContextLength = None,
    mem_top_k_attention: Annotated[
        bool,
        option(
            "--mem-top-k-attention",
            None,
            "Attend only to the --mem-top-k best tokens of the memory, as the paper does.",
            ADVANCED,
        ),
    ] = False,
    output: Annotated[Path, _output_option("passkey")] = Path("passkey"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Passkey retrieval: find a number that is hidden in a long prompt, by its length and the depth of the number.

    The prompts are the published ones (Mohtashami & Jaggi 2023), or use another kind of secret, or your own text and
    needle.
    """
    name = model.name
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import passkey as evaluation
        from llamory.evaluation.haystack import Needle

        model_kwargs = memory.model_kwargs(model.device)
        results = evaluation.evaluate(
            name,
            lengths,
            depths,
            output,
            trials=trials,
            seed=seed,
            needle=Needle.of(key, needle, question),
            haystack=haystack,
            independent_documents=independent_documents,
            evidence_ratio=evidence_ratio,
            last_context_length=last_context_length,
            baseline=baseline,
            model_kwargs=model_kwargs | ({"mem_top_k_attention": True} if mem_top_k_attention else {}),
        )
    if as_json:
        print_json(results.document())
    else:
        _print_passkey(results, evaluation.TITLES)
        _print_written(output, "passkey")


def _print_passkey(results: PasskeyResultsFile, titles: Mapping[str, str]) -> None:
    for kind, result in results.results.items():
        context = results.metadata[kind].get("context_length")
        typer.echo(f"{titles.get(kind, kind)}: {result.accuracy:.0%} of the keys found")
        for line in _passkey_table(result, context):
            typer.echo(line)
        if result.lengths_beyond_context(context):
            typer.echo(f"* longer than the context of {context:,} tokens")
        typer.echo()


def _passkey_table(result: PasskeyResult, context: int | None) -> list[str]:
    beyond = result.lengths_beyond_context(context)
    headers = [f"{length:,}{'*' if length in beyond else ''}" for length in result.lengths]
    rows = [("depth", headers)]
    for depth in result.depths:
        cells = [result.cell(length, depth) for length in result.lengths]
        rows.append((f"{depth:.0%}", ["-" if cell is None else f"{cell.accuracy:.0%}" for cell in cells]))
    widths = [max(6, len(header)) + 2 for header in headers]
    return [
        f"{title:>5}" + "".join(f"{entry:>{width}}" for entry, width in zip(entries, widths, strict=True))
        for title, entries in rows
    ]


# ---- perplexity ------------------------------------------------------------------------------------------------------


def perplexity(
    *,
    model: ModelsOptions,
    data: Annotated[
        list[Path],
        option("--data", options.path, "File or folder of long documents (repeatable).", DATA, metavar="PATH"),
    ],
    memory_tokens: Annotated[
        list[Any],
        option("--memory-tokens", options.token_counts, "Tokens in memory; 1k is 1024 tokens.", DATA, parse_all=True),
    ] = ["0,2k,4k,8k,16k,32k,64k"],  # noqa: B006
    scored_tokens: Annotated[
        int, option("--scored-tokens", integer(), "Tokens at the end of a document that are scored.", DATA)
    ] = 256,
    local_tokens: Annotated[
        int, option("--local-tokens", integer(), "Tokens before the scored ones that stay in the local context.", DATA)
    ] = 1,
    max_documents: Annotated[
        int | None,
        option(
            "--max-documents", integer(), "Largest number of documents; the first long enough ones are taken.", DATA
        ),
    ] = None,
    text_field: options.TextField = "text",
    independent_windows: Annotated[
        bool,
        option("--independent-windows", None, "Encode each window by itself, once for all lengths, and attach them."),
    ] = False,
    memory: MemoryOptions,
    output: Annotated[Path, _output_option("perplexity")] = Path("perplexity"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity of the last tokens of long documents, by the number of tokens before them that are in memory.

    Only documents that are long enough for the largest memory are used, so the same tokens are scored at every length.
    Every memory is encoded separately; with --independent-windows every window is.
    """
    names = model.names
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import perplexity as evaluation

        results = evaluation.evaluate(
            names,
            data,
            memory_tokens,
            output,
            tokens=scored_tokens,
            local=local_tokens,
            independent_windows=independent_windows,
            limit=max_documents,
            text_field=text_field,
            model_kwargs=memory.model_kwargs(model.device),
        )
    if as_json:
        print_json(results.document())
    else:
        _print_perplexity(results, scored_tokens)
        _print_written(output, "perplexity")


def _print_perplexity(results: PerplexityResultsFile, tokens: int) -> None:
    from llamory.evaluation.results import display_names

    def text(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.4f}"

    for name, shown in display_names(results.scores).items():
        curve = results.curve(name)
        typer.echo(f"{shown}: the last {tokens} tokens of {show_count(curve[0].documents, 'document')}")
        rows = [
            [
                f"{point.memory:,}",
                f"{point.perplexity:.3f}",
                text(point.loss),
                text(point.standard_error),
                text(point.change, sign="+"),
                text(point.change_standard_error),
            ]
            for point in curve
        ]
        print_table(["memory", "perplexity", "loss", "±", "change", "±"], rows)
        typer.echo()
    typer.echo("± is the standard error over documents; change is the loss minus the loss without memory.")


# ---- many-shot classification ----------------------------------------------------------------------------------------


def manyshot(
    *,
    model: ModelsOptions,
    train: Annotated[
        Path, option("--train", options.path, "JSON lines file with the demonstrations.", DATA, metavar="FILE")
    ],
    test: Annotated[
        Path | None,
        option(
            "--test",
            options.path,
            "JSON lines file with the questions; --train is split if not given.",
            DATA,
            metavar="FILE",
        ),
    ] = None,
    lengths: Annotated[
        list[Any],
        option(
            "--lengths",
            options.token_counts,
            "Largest numbers of tokens of demonstrations; 1k is 1024 tokens.",
            DATA,
            parse_all=True,
        ),
    ] = ["2k,4k,8k,16k"],  # noqa: B006
    num_seeds: Annotated[
        int, option("--num-seeds", integer(), "Random draws of demonstrations and questions.", DATA)
    ] = 3,
    num_questions: Annotated[int, option("--num-questions", integer(), "Questions per length and seed.", DATA)] = 100,
    text_field: options.TextField = "text",
    label_field: Annotated[str, option("--label-field", options.name, "Key of the label in JSONL files.")] = "label",
    template: Annotated[
        str, option("--template", options.text, r"Template of a demonstration; \n is a new line.", DATA)
    ] = r"{text}\n{label}\n\n",
    score_type: Annotated[
        Literal["mean", "sum"],
        option(
            "--score-type",
            None,
            "Score of a label: the mean or the sum of the log-probabilities of its tokens; the mean favours long "
            "labels.",
            DATA,
        ),
    ] = "mean",
    memory: MemoryOptions,
    output: Annotated[Path, _output_option("manyshot")] = Path("manyshot"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Classification accuracy, by the number of demonstrations in memory.

    Demonstrations are drawn at random for each seed. The answer is the label with the best score after the question.
    """
    names = model.names
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import manyshot as evaluation

        results = evaluation.evaluate(
            names,
            train,
            lengths,
            output,
            test=test,
            seeds=num_seeds,
            questions=num_questions,
            text_field=text_field,
            label_field=label_field,
            template=template.replace(r"\n", "\n"),
            score_type=score_type,
            model_kwargs=memory.model_kwargs(model.device),
        )
    if as_json:
        print_json(results.document())
    else:
        _print_manyshot(results)
        _print_written(output, "manyshot")


def _print_manyshot(results: ManyshotResultsFile) -> None:
    from llamory.evaluation.results import display_names

    labels = len(results.settings["labels"])
    for name, shown in display_names(results.scores).items():
        curve = results.curve(name)
        typer.echo(f"{shown}: {labels} labels, {show_count(curve[0].seeds, 'seed')}")
        rows = [
            [
                f"{point.length:,}",
                f"{point.demonstrations:,.1f}",
                f"{point.accuracy:.1%}",
                "-" if point.deviation is None else f"{point.deviation:.1%}",
            ]
            for point in curve
        ]
        print_table(["tokens", "demonstrations", "correct", "±"], rows)
        typer.echo()
    typer.echo("± is the standard deviation between seeds.")


# ---- dictionary look-up ----------------------------------------------------------------------------------------------


def lookup(
    model: ModelsOptions,
    memory_tokens: Annotated[
        list[Any],
        option(
            "--memory-tokens",
            options.token_counts,
            "Tokens in memory; 1k is 1024 tokens, 1M is 1024k.",
            DATA,
            parse_all=True,
        ),
    ] = ["4k,16k,64k,256k,1M,4M,16M"],  # noqa: B006
    num_documents: Annotated[int, option("--num-documents", integer(), "Documents with questions.", DATA)] = 16,
    seed: options.EvalSeed = 0,
    mem_search: Annotated[
        Literal["exact", "faiss"],
        option("--mem-search", None, "Search of the memory: faiss, or exact for a full scan.", ADVANCED),
    ] = "faiss",
    mem_top_k: Annotated[
        int, option("--mem-top-k", integer(), "Neighbours per query and head; 32 in the paper.", ADVANCED)
    ] = 32,
    mem_dtype: options.MemDtype = None,
    output: Annotated[Path, _output_option("lookup")] = Path("lookup"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Dictionary look-up of a model that `llamory train lookup` made, by the number of tokens in memory.

    As in the paper (Tworkowski et al. 2023, section 4.1), a query attends to its nearest neighbours in memory only.
    """
    if model.model is None and model.argument is None:
        raise LlamoryError("Name a model that `llamory train lookup` has made.")
    names = model.names
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import lookup as evaluation
        from llamory.models.device import pick_device

        results = evaluation.evaluate(
            names,
            memory_tokens,
            output,
            documents=num_documents,
            seed=seed,
            model_kwargs={
                "mem_search": mem_search,
                "mem_top_k": mem_top_k,
                "mem_dtype": mem_dtype,
                "device": pick_device(model.device),
            },
        )
    if as_json:
        print_json(results.document())
    else:
        _print_lookup(results)
        _print_written(output, "lookup")


def _print_lookup(results: LookupResultsFile) -> None:
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
        print_table(["memory", "correct tokens", "correct values", "encoding, s", "queries, s"], rows)
        typer.echo()


def _print_written(output: Path, evaluation: str) -> None:
    typer.echo(f"Written: {output / f'{evaluation}.json'} and {output / f'{evaluation}.png'}")


options.add_command(app, passkey, "passkey")
options.add_command(app, perplexity, "perplexity")
options.add_command(app, manyshot, "manyshot")
options.add_command(app, lookup, "lookup")
options.add_command(app, eval_retrieval.retrieval, "retrieval")
