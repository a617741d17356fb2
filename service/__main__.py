"""`python -m service` is `fairway`."""

from service.cli import main

main()
