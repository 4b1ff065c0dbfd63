"""`python -m saap.eval.cli`: the command `saap` where no script is installed."""

from .app import main

main()
