"""The command line, ``kroneckerbert``."""
