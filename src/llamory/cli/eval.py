"""`llamory eval`: measures what a model does with a memory, and how well a retriever finds what answers a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from llamory.cli import options
from llamory.cli.options import ADVANCED, OUTPUT, Option, explicit
from llamory.cli.output import print_json, print_table, show_count, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.lookup import LookupResultsFile
    from llamory.evaluation.manyshot import ManyshotResultsFile
    from llamory.evaluation.passkey import PasskeyResultsFile
    from llamory.evaluation.perplexity import PerplexityResultsFile
    from llamory.evaluation.results import ResultsFile
    from llamory.evaluation.retrieval import RetrievalResultsFile

    Results = TypeVar("Results", bound=ResultsFile[Any])

app = typer.Typer(help="Evaluate memory and retrieval.", rich_markup_mode="rich")

DATA = "Data"

_PASSKEY_LENGTHS, _DEPTHS, _MANYSHOT_LENGTHS = ["1k,2k,4k,8k"], ["5"], ["2k,4k,8k,16k"]
_PERPLEXITY_MEMORY, _LOOKUP_MEMORY = ["0,2k,4k,8k,16k,32k,64k"], ["4k,16k,64k,256k,1M,4M,16M"]


def _output_option(files: str) -> Option:
    return Option(f"Folder for {files}; a run that was interrupted resumes there.", OUTPUT)


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """The model that is evaluated, and its device."""

    argument: Annotated[
        str | None, typer.Argument(parser=options.name, metavar="MODEL", help="The same as --model.")
    ] = None
    model: Annotated[str | None, Option("Folder, .gguf file, hub id, or 'default' if not given.")] = None
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

    compare: Annotated[list[str] | None, Option("Another model for the same task.", metavar="MODEL")] = None

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
        float | None, Option("Sharpening of attention per log of the memory's size; by default the model's.", ADVANCED)
    ] = None
    memory_size_bias: Annotated[
        float | None, Option("How much the scores of a larger memory are lowered; by default the model's.", ADVANCED)
    ] = None
    bf16: options.Bf16 = False

    def model_kwargs(self, device: str | None) -> dict[str, Any]:
        """The arguments of `load_long_model`."""
        from llamory.models.device import pick_device

        kwargs = {"mem_layers": self.mem_layers, "context_length": self.context_length, "mem_search": self.mem_search}
        kwargs |= explicit(self, "mem_top_k", "logn_attention_scale", "memory_size_bias")
        return kwargs | ({"dtype": "bfloat16"} if self.bf16 else {}) | {"device": pick_device(device)}


def _list_option(help: str, parse_all: Callable[..., Any] = options.token_counts, metavar: str = "TOKENS") -> Option:
    return Option(help, DATA, metavar=metavar, parse_all=parse_all)


def _report(results: Results, show: Callable[[Results], None], *, as_json: bool) -> None:
    """Print results as JSON or by `show`, and the files that they are in."""
    if as_json:
        print_json(results.document())
        return
    show(results)
    assert results.path is not None
    typer.echo(f"Written: {results.path} and {results.path.with_suffix('.png')}")


def _print_scores(headers: Sequence[str], formats: Mapping[str, str], scores: Iterable[Any]) -> None:
    """Print attributes of scores as columns; `formats` holds the format of each, and None is shown as -."""
    values = ([(getattr(score, key), spec) for key, spec in formats.items()] for score in scores)
    print_table(headers, [["-" if value is None else format(value, spec) for value, spec in row] for row in values])
    typer.echo()


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
    lengths: Annotated[list[Any], _list_option("Lengths of the prompts; 1k is 1024 tokens.")] = _PASSKEY_LENGTHS,
    depths: Annotated[
        list[Any], _list_option("Number of depths from 0 (start) to 1 (end), or a list of them.", _depths, "DEPTHS")
    ] = _DEPTHS,
    trials: Annotated[int, Option("Prompts per length and depth.", DATA)] = 3,
    seed: options.EvalSeed = 0,
    haystack: Annotated[
        list[Path] | None, Option("Text around the needle, a file or folder, instead of the published text.", DATA)
    ] = None,
    key: Annotated[
        Literal["number", "name", "date", "sentence"], Option("Kind of secret, with its needle and question.", DATA)
    ] = "number",
    needle: Annotated[str | None, Option("Sentence to hide, with {key} for the secret.", DATA, options.text)] = None,
    question: Annotated[
        str | None, Option("Text that asks for the secret; --needle before {key} if not given.", DATA, options.text)
    ] = None,
    independent_documents: Annotated[bool, Option("Encode each window as a document of a library.")] = False,
    evidence_ratio: Annotated[float, Option("As for `ask`, with --independent-documents; 0 keeps all.")] = 0.0,
    baseline: Annotated[bool, Option("Also evaluate the plain model without memory, even beyond its context.")] = False,
    memory: MemoryOptions,
    last_context_length: options.LastContextLength = None,
    mem_top_k_attention: Annotated[bool, Option("Attend to the --mem-top-k best tokens only.", ADVANCED)] = False,
    output: Annotated[Path, _output_option("passkey.json and passkey.png")] = Path("passkey"),
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
    _report(results, _print_passkey, as_json=as_json)


def _print_passkey(results: PasskeyResultsFile) -> None:
    from llamory.evaluation.passkey import TITLES

    for kind, result in results.results.items():
        context = results.metadata[kind].get("context_length")
        beyond = result.lengths_beyond_context(context)
        typer.echo(f"{TITLES.get(kind, kind)}: {result.accuracy:.0%} of the keys found")
        headers = [f"{length:,}{'*' if length in beyond else ''}".rjust(6) for length in result.lengths]
        rows = []
        for depth in result.depths:
            cells = [result.cell(length, depth) for length in result.lengths]
            rows.append([f"{depth:.0%}", *("-" if cell is None else f"{cell.accuracy:.0%}" for cell in cells)])
        print_table(["depth", *headers], rows)
        if beyond:
            typer.echo(f"* longer than the context of {context:,} tokens")
        typer.echo()


def perplexity(
    *,
    model: ModelsOptions,
    data: Annotated[list[Path], Option("File or folder of long documents.", DATA)],
    memory_tokens: Annotated[list[Any], _list_option("Tokens in memory; 1k is 1024 tokens.")] = _PERPLEXITY_MEMORY,
    scored_tokens: Annotated[int, Option("Tokens at the end of a document that are scored.", DATA)] = 256,
    local_tokens: Annotated[int, Option("Tokens before the scored ones that stay in the local context.", DATA)] = 1,
    max_documents: Annotated[int | None, Option("Documents to use, the first long enough ones.", DATA)] = None,
    text_field: options.TextField = "text",
    independent_windows: Annotated[bool, Option("Encode each window by itself, once for all lengths.")] = False,
    memory: MemoryOptions,
    output: Annotated[Path, _output_option("perplexity.json and perplexity.png")] = Path("perplexity"),
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
    _report(results, _print_perplexity, as_json=as_json)


def _print_perplexity(results: PerplexityResultsFile) -> None:
    from llamory.evaluation.results import display_names

    headers = ["memory", "perplexity", "loss", "±", "change", "±"]
    formats = {"memory": ",", "perplexity": ".3f", "loss": ".4f", "standard_error": ".4f"}
    formats |= {"change": "+.4f", "change_standard_error": ".4f"}
    for name, shown in display_names(results.scores).items():
        curve = results.curve(name)
        documents = show_count(curve[0].documents, "document")
        typer.echo(f"{shown}: the last {results.settings['tokens']} tokens of {documents}")
        _print_scores(headers, formats, curve)
    typer.echo("± is the standard error over documents; change is the loss minus the loss without memory.")


def manyshot(
    *,
    model: ModelsOptions,
    train: Annotated[Path, Option("JSON lines file with the demonstrations.", DATA)],
    test: Annotated[Path | None, Option("JSON lines of the questions; --train is split if not given.", DATA)] = None,
    lengths: Annotated[list[Any], _list_option("Largest numbers of tokens of demonstrations.")] = _MANYSHOT_LENGTHS,
    num_seeds: Annotated[int, Option("Random draws of demonstrations and questions.", DATA)] = 3,
    num_questions: Annotated[int, Option("Questions per length and seed.", DATA)] = 100,
    text_field: options.TextField = "text",
    label_field: Annotated[str, Option("Key of the label in JSONL files.")] = "label",
    template: Annotated[str, Option(r"Demonstration; \n is a new line.", DATA, options.text)] = r"{text}\n{label}\n\n",
    score_type: Annotated[
        Literal["mean", "sum"],
        Option("Mean or sum of the log-probabilities of a label's tokens; the mean favours long labels.", DATA),
    ] = "mean",
    memory: MemoryOptions,
    output: Annotated[Path, _output_option("manyshot.json and manyshot.png")] = Path("manyshot"),
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
    _report(results, _print_manyshot, as_json=as_json)


def _print_manyshot(results: ManyshotResultsFile) -> None:
    from llamory.evaluation.results import display_names

    headers = ["tokens", "demonstrations", "correct", "±"]
    formats = {"length": ",", "demonstrations": ",.1f", "accuracy": ".1%", "deviation": ".1%"}
    labels = len(results.settings["labels"])
    for name, shown in display_names(results.scores).items():
        curve = results.curve(name)
        typer.echo(f"{shown}: {labels} labels, {show_count(curve[0].seeds, 'seed')}")
        _print_scores(headers, formats, curve)
    typer.echo("± is the standard deviation between seeds.")


def lookup(
    model: ModelsOptions,
    memory_tokens: Annotated[list[Any], _list_option("Tokens in memory; 1M is 1024k.")] = _LOOKUP_MEMORY,
    num_documents: Annotated[int, Option("Documents with questions.", DATA)] = 16,
    seed: options.EvalSeed = 0,
    mem_search: Annotated[Literal["exact", "faiss"], Option("Memory search; exact scans all.", ADVANCED)] = "faiss",
    mem_top_k: Annotated[int, Option("Neighbours per query and head; 32 in the paper.", ADVANCED)] = 32,
    mem_dtype: options.MemDtype = None,
    output: Annotated[Path, _output_option("lookup.json and lookup.png")] = Path("lookup"),
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

        search = {"mem_search": mem_search, "mem_top_k": mem_top_k}
        results = evaluation.evaluate(
            names,
            memory_tokens,
            output,
            documents=num_documents,
            seed=seed,
            model_kwargs=search | {"mem_dtype": mem_dtype, "device": pick_device(model.device)},
        )
    _report(results, _print_lookup, as_json=as_json)


def _print_lookup(results: LookupResultsFile) -> None:
    from llamory.evaluation.results import display_names

    headers = ["memory", "correct tokens", "correct values", "encoding, s", "queries, s"]
    formats = {"tokens": ",", "accuracy": ".1%", "value_accuracy": ".1%"}
    formats |= {"encode_seconds": ".0f", "query_seconds": ".0f"}
    for name, shown in display_names(results.scores).items():
        cells = results.scores[name]
        typer.echo(f"{shown}: {cells[0].num_values if cells else 0} values asked for")
        _print_scores(headers, formats, cells)


def retrieval(
    data: Annotated[str, typer.Argument(parser=options.name, help="A BEIR folder, or the name of an mteb task.")],
    model: Annotated[
        list[str] | None, Option("Retriever: 'default', a LLARA or Sentence Transformers folder, or a hub id.")
    ] = None,
    mean_pooling: Annotated[list[str] | None, Option("LLaMA to score by the mean of its hidden states.")] = None,
    bm25: Annotated[bool, Option("Also score BM25.", flag="--bm25/--no-bm25")] = True,
    split: Annotated[str | None, Option("Split of the qrels; test, or the only one there is, if not given.")] = None,
    num_queries: Annotated[int | None, Option("Sample this many queries, by a hash.")] = None,
    num_documents: Annotated[int | None, Option("Sample this many documents and all relevant ones.")] = None,
    max_length: Annotated[int | None, Option("Tokens of a text that a model reads.")] = None,
    query_prompt: options.QueryPrompt = None,
    device: options.Device = None,
    ignore_identical_ids: Annotated[
        bool, Option("Skip a document with the query's id, as BEIR does, even if its text differs.", ADVANCED)
    ] = False,
    bf16: options.Bf16 = False,
    per_query: Annotated[Path | None, Option("JSON lines file for the scores per query and model.", OUTPUT)] = None,
    output: Annotated[Path | None, _output_option("retrieval.json and queries.jsonl")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Scores of retrievers and BM25: nDCG@10, MRR@10 and Recall@100, with 95% bootstrap intervals."""
    names, mean_pooling_models = options.distinct_names(model or []), options.distinct_names(mean_pooling or [])
    if not names and not mean_pooling_models and not bm25:
        raise LlamoryError("There is nothing to score: give a --model, or leave out --no-bm25.")
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation import retrieval as evaluation
        from llamory.evaluation.results import display_names
        from llamory.models.device import pick_device

        results = evaluation.evaluate(
            data,
            names,
            mean_pooling=mean_pooling_models,
            bm25=bm25,
            split=split,
            num_queries=num_queries,
            num_documents=num_documents,
            ignore_identical_ids=ignore_identical_ids,
            max_length=max_length,
            query_prompt=query_prompt,
            bf16=bf16,
            device=pick_device(device),
            output=output,
            per_query=per_query,
        )
    if as_json:
        print_json(results.document())
    else:
        shown = display_names([*names, *mean_pooling_models])
        run_name = evaluation.mean_pooling_name
        shown |= {run_name(name): run_name(shown[name]) for name in mean_pooling_models}
        _print_retrieval(results, shown)
        if written := [str(path) for path in (output, per_query) if path is not None]:
            typer.echo(f"Written: {' and '.join(written)}")


def _print_retrieval(report: RetrievalResultsFile, shown: dict[str, str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from llamory.evaluation.retrieval import METRICS

    settings, document = report.settings, report.document()
    counts = f"{settings['queries']:,} queries, {settings['documents']:,} documents"
    console = Console(highlight=False)
    console.print(f"{settings['data']} ({settings['split']}): {counts}", markup=False, soft_wrap=True)
    if missing := settings["relevant_documents_missing"]:
        console.print(f"{missing:,} relevant documents are not among them and can't be found.", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")  # a path may be long
    for metric in METRICS:
        table.add_column(metric, justify="right", no_wrap=True)
    for name, metadata in document["runs"].items():
        table.add_row(shown.get(name, name), *(_format_with_interval(metadata, metric, "\n") for metric in METRICS))
    console.print(table)
    for entry in document["differences"]:
        one, other = (shown.get(entry[side], entry[side]) for side in ("model", "minus"))
        low, high = entry["intervals"]["nDCG@10"] or (0, 0)
        significance = "beyond" if low > 0 or high < 0 else "within"
        difference = _format_with_interval(entry, "nDCG@10", " ", sign="+")
        text = f"nDCG@10 of {one} minus {other}: {difference}, {significance} chance"
        console.print(text, markup=False, soft_wrap=True)


def _format_with_interval(entry: dict[str, Any], metric: str, separator: str, *, sign: str = "") -> str:
    bounds = entry["intervals"][metric]
    value = f"{entry[metric]:{sign}.3f}"
    return value if bounds is None else f"{value}{separator}({bounds[0]:{sign}.3f} to {bounds[1]:{sign}.3f})"


for _command in (passkey, perplexity, manyshot, lookup, retrieval):
    options.add_command(app, _command)
