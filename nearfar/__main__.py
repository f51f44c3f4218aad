"""`python -m nearfar` is `nearfar`."""

from nearfar.cli.main import main

main()
