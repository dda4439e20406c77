"""Measures what real runs take: `python peak_memory.py CASES.json` prints one JSON list of bytes.

With RANK PORT behind it every case is run by two such processes, as torchrun would start them.

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


def group(rank: str, port: int) -> dict[str, str]:
    """The environment of one of two processes."""
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "RANK": rank}
    ranks |= {"LOCAL_RANK": rank, "TORCHELASTIC_RUN_ID": "test"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


if __name__ == "__main__":
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    path, *rank = sys.argv[1:]
    warm, *cases = json.loads(Path(path).read_text())
    out = os.dup(1)
    os.dup2(2, 1)  # the only thing on the standard output is the result
    main(warm)
    groups = [group(rank[0], int(rank[1]) + i) if rank else {} for i in range(len(cases))]
    found = [measured(words, given) for words, given in zip(cases, groups, strict=True)]
    print(json.dumps(found), file=os.fdopen(out, "w"))
