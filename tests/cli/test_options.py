"""Options that commands share: one parser each, and a wrong value is refused by one sentence that names the option."""

import dataclasses
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.main import get_command

from llamory.cli import options


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (["6,12,18"], [6, 12, 18]),
        (["5-8"], [5, 6, 7, 8]),
        (["3,7-9"], [3, 7, 8, 9]),
        (["1 3-4"], [1, 3, 4]),
        (["3", "7-9", "3"], [3, 7, 8, 9]),
    ],
)
def test_layers(values, layers) -> None:
    assert options.layers(values) == layers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1, 3-4", "should be layers, such as 6,12,18 or 5-29"),
        ("six", "should be layers"),
        ("-3", "should be layers"),
        ("29-5", "The range 29-5 ends before it begins; write 5-29"),
        ("5-99999999999", "There is no layer 99999999999"),
    ],
)
def test_wrong_layers_are_refused(text, message) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        options.layers([text])


def test_layers_are_shown_in_the_form_that_is_parsed() -> None:
    assert options.show_layers([5, 6, 7, 9, 12, 11]) == "5-7,9,11-12"
    assert options.layers([options.show_layers([5, 6, 7, 9, 12, 11])]) == [5, 6, 7, 9, 11, 12]


def test_token_counts() -> None:
    assert options.token_counts(["0,2k", "1M"]) == [0, 2048, 1 << 20]
    for wrong in (["many"], [","], ["-1"], ["k"], ["9" * 30]):
        with pytest.raises(typer.BadParameter, match="numbers of tokens"):
            options.token_counts(wrong)


@pytest.mark.parametrize(
    ("parse", "value", "message"),
    [
        (options.integer(), "99999999999999999999", "is not a whole number from 1 to"),
        (options.integer(), "0", "is not a whole number from 1 to"),
        (options.integer(0, options.MAX_SEED), "-1", "is not a whole number from 0 to"),
        (options.integer(), "1.5", "is not a whole number"),
        (options.number(), "nan", "is not a number from 0 on"),
        (options.number(infinite=True), "nan", "is not a number from 0 on"),
        (options.number(), "inf", "is not a number from 0 on"),
        (options.number(), "-1", "is not a number from 0 on"),
        (options.name, " ", "It is empty"),
        (options.path, "", "The path is empty"),
        (options.text, "\udcff\udcfe", r"'\\udcff\\udcfe' is not valid UTF-8 text"),
    ],
)
def test_values_out_of_bounds_are_refused(parse, value, message) -> None:
    with pytest.raises(typer.BadParameter, match=message):
        parse(value)


def test_bytes_that_the_locale_cannot_decode_are_read_as_utf_8() -> None:
    assert options.text("温室".encode().decode("ascii", "surrogateescape")) == "温室"


@dataclasses.dataclass(kw_only=True)
class Lamp:
    color: Annotated[str, typer.Option(help="Its colour.")] = "red"
    watts: Annotated[int | None, options.Option("Its power.", flag="--power")] = None


def test_a_parameter_of_a_group_becomes_one_option_per_field() -> None:
    made: list[tuple[Path, Lamp]] = []

    def light(where: Annotated[Path, typer.Argument(parser=options.path)], lamp: Lamp) -> None:
        made.append((where, lamp))

    app = typer.Typer()
    options.add_command(app, light)
    get_command(app).main(["here", "--power", "7"], standalone_mode=False)
    assert made == [(Path("here"), Lamp(color="red", watts=7))]


def test_only_options_that_were_given_are_chosen() -> None:
    assert options.explicit(Lamp(color="")) == {"color": ""}
    assert options.explicit(Lamp(watts=0)) == {"color": "red", "watts": 0}
    assert options.explicit(Lamp(watts=3), "watts") == {"watts": 3}


# ---- the same in every command ---------------------------------------------------------------------------------------

COMMANDS = {
    "index": ("index", "docs"),
    "search": ("search", "bridge"),
    "ask": ("ask", "Who?"),
    "chat": ("chat",),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_library_without_a_name_is_refused(llamory, tmp_path, monkeypatch, command) -> None:
    monkeypatch.chdir(tmp_path)
    assert llamory(*command, "--library", "") == (2, "", "Error: Invalid value for '--library': It is empty.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("search", "bridge", "--library", "lib", "--top", "99999999999999999999"), "--top"),
        (("search", "\udcff\udcfe", "--library", "lib"), "query"),
        (("search", "bridge", "--library", "lib", "--source", "\udcff"), "--source"),
        (("ask", "\udcff", "--library", "lib"), "question"),
        (("ask", "Who?", "--library", "lib", "--temperature", "1", "--seed", "9" * 23), "--seed"),
        (("ask", "Who?", "--library", "lib", "--temperature", "nan"), "--temperature"),
        (("ask", "Who?", "--library", "lib", "--mem-layers", "5-2"), "--mem-layers"),
        (("ask", "Who?", "--memory", ""), "--memory"),
        (("index", "docs", "--library", "lib", "--max-file-size", "nan"), "--max-file-size"),
        (("index", "docs", "--library", "lib", "--mem-layers", "29-5"), "--mem-layers"),
        (("read", "docs", "--memory", "book", "--mem-layers", "29-5"), "--mem-layers"),
        (("read", "docs", "--memory", "book", "--max-tokens", "0"), "--max-tokens"),
        (("export", "model", "--output", ""), "--output"),
        (("dataset", "functions", "--output", ""), "--output"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_its_option(llamory, arguments, flag) -> None:
    ran = llamory(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"Error: Invalid value for '{flag}': ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "nosuch"])
@pytest.mark.parametrize(
    "command",
    [
        *((*command, "--library", "lib") for command in COMMANDS.values()),
        ("read", "docs", "--memory", "book"),
        ("export", "default", "--output", "out"),
    ],
    ids=[*COMMANDS, "read", "export"],
)
def test_a_device_that_is_not_there_is_refused(llamory, tmp_path, monkeypatch, command, device) -> None:
    import torch

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("This machine has the device.")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    ran = llamory(*command, "--device", device)
    assert (ran.code, ran.out) == (2, "")
    assert f"no device '{device}' on this machine; it has cpu" in ran.err.splitlines()[-1]


@pytest.mark.parametrize("task", ["passkey", "perplexity", "manyshot", "lookup", "retrieval"])
def test_evaluations_refuse_a_device_that_is_not_there(llamory, tmp_path, monkeypatch, task) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.jsonl").write_text("{}\n")
    data = {"perplexity": ("--data", "data.jsonl"), "manyshot": ("--train", "data.jsonl")}.get(task, ())
    ran = llamory("eval", task, "default", *data, "--device", "nosuch")
    assert (ran.code, ran.out) == (2, "")
    assert "no device 'nosuch' on this machine; it has cpu" in ran.err


@pytest.mark.parametrize("task", ["passkey", "perplexity", "manyshot"])
def test_evaluations_have_the_same_parser_of_layers(llamory, task) -> None:
    ran = llamory("eval", task, "default", "--mem-layers", "29-5")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Error: Invalid value for '--mem-layers': The range 29-5 ends before it begins")
