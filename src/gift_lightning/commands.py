"""The commands of `gift`: its help comes at once, and only what is asked for is imported."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gift_lightning import __version__

STAGES = {
    "fit": "train by a config or by flags",
    "validate": "measure a model on the validation data",
    "test": "measure a model on the test data: by default those of validation",
    "cache-reference": "write a reference's most likely tokens, so that training runs without it",
}
"""What LightningCLI runs, each with its one line of help."""

APART = {
    "ablate": "run arms x seeds x stages of an experiment file",
    "compare": "tell which differences between runs are real",
    "evaluate": "measure a finished run with the tasks of lm-evaluation-harness",
    "export": "write any checkpoint of a run as a Hugging Face folder",
    "plan": "tell how much memory a run takes on each device, by the flags of fit",
}
"""Commands with a module of their name, whose `main` takes the words behind it."""


_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def usage() -> str:
    """What `gift --help` says."""
    commands = [f"  {name:17}{line}" for name, line in {**STAGES, **APART}.items()]
    lines = [
        "usage: gift COMMAND ...",
        "",
        "Post-training as a choice of target distribution, in PyTorch Lightning.",
        "",
        "commands (`gift COMMAND --help` has the options of each):",
        *commands,
        "",
        "options:",
        "  -h, --help       show this and exit",
        "  --version        show the version and exit",
    ]
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the `gift` command; see `cli.main` for its errors."""
    words = sys.argv[1:] if args is None else list(args)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
    elif words[0] == "--version":
        print(f"gift-lightning {__version__}")
    else:
        if _HUGE_PAGES.exists():  # Linux; PyTorch reads it once, and allocates large CPU tensors so
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        from gift_lightning import cli  # lightning and transformers take seconds to import

        cli.main(words)
