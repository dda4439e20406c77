"""`python -m gift_lightning` is `gift`."""

from gift_lightning.commands import main

main()
