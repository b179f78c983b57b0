"""`python -m smelt`."""

from smelt.cli.main import main

main()
