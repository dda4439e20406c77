"""`python -m gift_lightning` is `gift`."""

from gift_lightning.cli import main

main()
