import typer

app = typer.Typer()


@app.callback()
def _data() -> None:
    """Placeholder."""
