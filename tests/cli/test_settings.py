"""A dataclass becomes a command: its fields are flags and keys of a YAML file, and wrong values are named."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.main import get_command

from llamory.cli.settings import add_settings_command, read_settings
from llamory.errors import LlamoryError


@dataclass
class Baking:
    """Bake bread."""

    flour: list[str] = field(metadata={"help": "Sacks of flour."})
    oven: Path = field(metadata={"help": "Which oven."})
    loaves: int = field(default=12, metadata={"help": "How many."})
    heat: float = field(default=230.0, metadata={"help": "Degrees."})
    name: str | None = None
    steam: bool = field(default=True, metadata={"help": "Wet air."})
    crust: Literal["soft", "hard"] = "hard"
    seeds: list[str] = field(default_factory=lambda: ["poppy"])
    limit: int | None = None


DEFAULTS = asdict(Baking(flour=["rye"], oven=Path("stone")))


@pytest.fixture
def bake():
    """Runs the command and gives the settings it ran with."""

    def run(*arguments: str) -> dict[str, Any]:
        app = typer.Typer()
        got: list[Baking] = []
        add_settings_command(app, "bake", Baking, lambda settings: got.append(settings) or {})
        get_command(app).main(list(arguments), standalone_mode=False)
        return asdict(got[0])

    return run


@pytest.fixture
def config(tmp_path: Path):
    """Writes a settings file."""

    def write(text: str) -> Path:
        path = tmp_path / "bake.yaml"
        path.write_text(text)
        return path

    return write


def refused(path: Path | None, **given: Any) -> str:
    with pytest.raises(LlamoryError) as error:
        read_settings(Baking, path, given)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_hold_where_nothing_is_given(bake) -> None:
    assert bake("--flour", "rye", "--oven", "stone") == DEFAULTS


def test_every_field_is_a_flag(bake) -> None:
    flags = "--flour rye --flour oat --oven o --loaves 3 --heat 1e-5 --name n --no-steam --crust soft --seeds flax"
    assert bake(*flags.split(), "--limit", "7") == {
        "flour": ["rye", "oat"],
        "oven": Path("o"),
        "loaves": 3,
        "heat": 1e-5,
        "name": "n",
        "steam": False,
        "crust": "soft",
        "seeds": ["flax"],
        "limit": 7,
    }


def test_a_file_gives_the_same_names_and_types(bake, config) -> None:
    # YAML itself reads 1e-5 as text, so numbers have to be read by the field's type.
    path = config(
        "flour: rye\noven: o\nloaves: 1e3\nheat: 1e-5\nname: null\nsteam: false\ncrust: soft\nseeds: [a, b]\nlimit: 7\n"
    )
    got = bake("--config", str(path))
    assert got == {
        "flour": ["rye"],
        "oven": Path("o"),
        "loaves": 1000,
        "heat": 1e-5,
        "name": None,
        "steam": False,
        "crust": "soft",
        "seeds": ["a", "b"],
        "limit": 7,
    }
    assert type(got["loaves"]) is int


def test_flags_win_over_the_file_even_with_a_default_value(bake, config) -> None:
    path = config("flour: [rye]\noven: file\nloaves: 3\nsteam: false\nheat: 10\n")
    got = bake("--config", str(path), "--loaves", "12", "--steam", "--oven", "flag")
    assert got == DEFAULTS | {"loaves": 12, "steam": True, "oven": Path("flag"), "heat": 10.0}


def test_hyphens_in_keys_are_as_good_as_underscores(tmp_path: Path) -> None:
    @dataclass
    class Two:
        big_oven: str = ""

    (tmp_path / "two.yaml").write_text("big-oven: yes please\n")
    assert read_settings(Two, tmp_path / "two.yaml", {}).big_oven == "yes please"


def test_an_empty_file_gives_nothing(config) -> None:
    assert read_settings(Baking, config(""), {"flour": ["rye"], "oven": Path("stone")}) == Baking(
        ["rye"], Path("stone")
    )


def test_an_unknown_key_is_named_with_the_nearest_known_one(config) -> None:
    sentence = refused(config("flour: rye\noven: o\nloafs: 3\n"))
    assert "loafs" in sentence
    assert "did you mean loaves?" in sentence


def test_an_unknown_key_like_no_other_gets_the_list(config) -> None:
    assert "flour, oven, loaves" in refused(config("xyz: 1\n"))


def test_missing_values_are_named_as_flags() -> None:
    sentence = refused(None)
    assert "--flour and --oven must be given" in sentence


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("loaves: many", "loaves in {file} must be a whole number, not 'many'."),
        ("loaves: 1.5", "loaves in {file} must be a whole number, not 1.5."),
        ("loaves: true", "loaves in {file} must be a whole number, not True."),
        ("loaves: null", "loaves in {file} must be a whole number, not None."),
        ("heat: hot", "heat in {file} must be a number, not 'hot'."),
        ("steam: 1", "steam in {file} must be true or false, not 1."),
        ("name: [a]", "name in {file} must be text, not ['a']."),
        ("seeds: [1]", "seeds in {file} must be text, not 1."),
        ("oven: 3", "oven in {file} must be a path, not 3."),
        ("crust: burnt", "crust in {file} must be one of soft, hard, not 'burnt'."),
    ],
)
def test_a_value_of_the_wrong_type_is_named(config, line: str, wanted: str) -> None:
    path = config(line)
    assert refused(path) == wanted.format(file=path)


@pytest.mark.parametrize(
    ("text", "words"), [("a: [1", "not valid YAML"), ("- a\n- b", "must hold settings"), ("just text", "must hold")]
)
def test_a_file_that_holds_no_settings_is_said(config, text: str, words: str) -> None:
    assert words in refused(config(text))


def test_an_absent_settings_file_is_said(tmp_path: Path) -> None:
    assert "no settings file" in refused(tmp_path / "none.yaml")


def test_a_settings_file_that_is_no_text_is_said(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not a text file" in refused(tmp_path / "bytes.yaml")


def test_help_shows_what_fields_mean_and_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(rich_markup_mode="rich")
    add_settings_command(app, "bake", Baking, asdict)
    get_command(app).main(["--help"], standalone_mode=False)
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "Bake bread." in page
    assert "Sacks of flour. (repeatable) Required here or in --config." in page
    assert "How many. [default: 12]" in page
    assert "--steam --no-steam <bool> Wet air. [default: steam]" in page
    assert "[default: poppy]" in page


def test_the_result_is_one_json_document_and_chatter_goes_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(settings: Baking) -> dict[str, Any]:
        print("kneading ...")
        return {"loaves": settings.loaves, "loss": math.nan, "where": settings.oven, "parts": {"crumb": math.inf}}

    app = typer.Typer()
    add_settings_command(app, "bake", Baking, run)
    get_command(app).main(["--flour", "rye", "--oven", "stone", "--json"], standalone_mode=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"loaves": 12, "loss": None, "where": "stone", "parts": {"crumb": None}}
    assert "kneading" in printed.err


def test_a_dataclass_with_a_quiet_field_keeps_it(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass
    class Nap:
        quiet: bool = False

    def run(nap: Nap) -> dict[str, Any]:
        import sys

        print("snoring", file=sys.stderr)
        return {"was_quiet": nap.quiet}

    app = typer.Typer()
    add_settings_command(app, "nap", Nap, run)
    get_command(app).main(["--quiet"], standalone_mode=False)
    printed = capsys.readouterr()
    assert printed.out.split() == ["was", "quiet", "True"]
    assert printed.err == ""


def test_only_the_first_of_several_processes_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    app = typer.Typer()
    add_settings_command(app, "bake", Baking, asdict)
    get_command(app).main(["--flour", "rye", "--oven", "stone"], standalone_mode=False)
    assert capsys.readouterr().out == ""
