"""Measures what real runs take: `python peak_memory.py CASES.json` prints one JSON list of bytes.

With one more file, what torchrun would say to this process for each case, it is one of several.

Every case is a command line of `gift`, run in a process of its own that is forked when the first of
them has imported and warmed what all need. What counts is anonymous memory: how many pages of the
libraries are resident is for the kernel to say. Freed memory goes back to the system at once, so
that the peak is that of what was alive.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

from gift_lightning.cli import main

_MMAP_THRESHOLD = -3  # of mallopt: memory blocks above are mapped, and unmapped when they are freed


def resident(key: str) -> int:
    """Bytes: `RssAnon` and `RssFile` now, `VmHWM` of both at their highest."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(key))


def grown(words: list[str]) -> int:
    """By how much a command's peak is above what was there before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("RssAnon")
    main(words)
    return resident("VmHWM") - resident("RssFile") - before  # what is read from files only grows


def measured(words: list[str], group: dict[str, str]) -> int:
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.environ.update(group)
        os.write(sender, str(grown(words)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(receiver, 64))


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    warm, *cases = json.loads(Path(sys.argv[1]).read_text())
    groups = json.loads(Path(sys.argv[2]).read_text()) if sys.argv[2:] else [{}] * len(cases)
    out = os.dup(1)
    os.dup2(2, 1)  # the only thing on the standard output is the result
    main(warm)
    found = [measured(words, given) for words, given in zip(cases, groups, strict=True)]
    print(json.dumps(found), file=os.fdopen(out, "w"))
