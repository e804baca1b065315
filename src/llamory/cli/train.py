"""`llamory train`: one command per training recipe, its flags taken from the recipe's settings."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from llamory.cli.options import add_dataclass_command


class Recipe(NamedTuple):
    """Where a recipe's settings and its function are, and what it does."""

    settings: str
    run: str
    help: str


RECIPES = {
    "llara": Recipe(
        "llamory.training.settings:LlaraSettings",
        "llamory.training.llara:train_llara",
        "Train a LLaMA to embed passages and queries without labels (LLARA).",
    ),
}


class _RecipeGroup(TyperGroup):
    """Finds a recipe's settings when its command is asked for, and its function when the command runs."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(RECIPES)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        if cmd_name not in RECIPES:
            return None
        recipe = RECIPES[cmd_name]
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        add_dataclass_command(
            single,
            cmd_name,
            resolve_name(recipe.settings),
            lambda settings: resolve_name(recipe.run)(settings),
            help=recipe.help,
        )
        return get_command(single)


app = typer.Typer(cls=_RecipeGroup, help="Train a model with one of the recipes.", rich_markup_mode=None)


@app.callback()
def _train() -> None:
    pass
