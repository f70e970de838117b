"""`python -m rnas` is `rnas`."""

from rnas.cli import main

main()
