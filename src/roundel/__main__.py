"""`python -m roundel`."""

from roundel.commands.app import main

main()
