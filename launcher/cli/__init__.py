"""The command line: each command is a function, and its parameters are the arguments and options.

What a command needs is imported in it, so that `--help` and mistakes are answered at once.
"""

from launcher.cli.command_line import app, main

__all__ = ["app", "main"]
