"""``python -m kroneckerbert``: the command line."""

from kroneckerbert.cli.app import app

app(prog_name="kroneckerbert")
