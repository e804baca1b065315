"""`llamory eval`: measures what a model does with long texts."""

from __future__ import annotations

import typer

from llamory.cli import eval_lookup, eval_manyshot, eval_passkey, eval_perplexity

app = typer.Typer(help="Measure what a model does with long texts.", rich_markup_mode=None)
app.command(name="passkey")(eval_passkey.passkey)
app.command(name="perplexity")(eval_perplexity.perplexity)
app.command(name="lookup")(eval_lookup.lookup)
app.command(name="manyshot")(eval_manyshot.manyshot)


@app.callback()
def _eval() -> None:
    pass
