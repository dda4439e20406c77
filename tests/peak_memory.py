"""Measures what real runs take: `python peak_memory.py CASES.json` prints one JSON list of bytes.

Every case is a command line of `gift`, run in a process of its own that is forked when everything
is imported and warm. Freed memory goes back to the system at once, so that the peak of the resident
memory is that of what was alive.
"""

import ctypes
import gc
import json
import os
import resource
import sys
from pathlib import Path

from gift_lightning.cli import main

_MMAP_THRESHOLD = -3  # of mallopt: memory blocks above are mapped, and unmapped when they are freed


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def grown(words: list[str]) -> int:
    """By how much a command's peak is above what was there before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident()
    main(words)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measured(words: list[str]) -> int:
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(2, 1)  # the only thing on the standard output is the result
        os.write(sender, str(grown(words)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(receiver, 64))


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    warm, *cases = json.loads(Path(sys.argv[1]).read_text())
    out = os.dup(1)
    os.dup2(2, 1)
    main(warm)
    print(json.dumps([measured(words) for words in cases]), file=os.fdopen(out, "w"))
