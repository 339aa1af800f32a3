"""``python -m kroneckerbert``: the command line."""

from kroneckerbert.cli import app

app(prog_name="kroneckerbert")
