"""`llamory eval`: measures what a model does with long texts, and how well it finds things."""

from __future__ import annotations

import typer

from llamory.cli import eval_lookup, eval_manyshot, eval_passkey, eval_perplexity, eval_retrieval

app = typer.Typer(
    help="Measure what a model does with long texts, and how well it finds things.", rich_markup_mode="rich"
)
app.command(name="passkey")(eval_passkey.passkey)
app.command(name="perplexity")(eval_perplexity.perplexity)
app.command(name="lookup")(eval_lookup.lookup)
app.command(name="manyshot")(eval_manyshot.manyshot)
app.command(name="retrieval")(eval_retrieval.retrieval)


@app.callback()
def _eval() -> None:
    pass
