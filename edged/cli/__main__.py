"""`python -m edged.cli`: the console script, found without a PATH."""

from . import run

run()
