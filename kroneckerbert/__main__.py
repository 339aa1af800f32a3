"""``python -m kroneckerbert``: the command line."""

from kroneckerbert.cli.app import app

if __name__ == "__main__":
    app(prog_name="kroneckerbert")
