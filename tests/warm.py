"""Processes that start with the package imported: one per test process imports, the others are its
forks. Importing takes longer than most of what tests start, and is the same each time."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

context = multiprocessing.get_context("forkserver")  # conftest.py says what it imports


def group(ranks: int) -> list[dict[str, str]]:
    """What torchrun would say to each process of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(ranks)]


def start(words: Sequence[str], folder: Path, env: dict[str, str], log: Path) -> BaseProcess:
    """`python WORDS` in a folder, where words are `-m MODULE ...` or `SCRIPT ...`, with all that it
    says written to `log` and `log` + `.err`."""
    process = context.Process(target=_become, args=(list(words), str(folder), env, str(log)))
    process.start()
    return process


def run(words: Sequence[str], folder: Path, **env: str) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run([sys.executable, *words], text=True)` gives."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        process = start(words, folder, {**os.environ, **env}, out)
        process.join(600)
        if process.exitcode is None:
            process.kill()  # the end of the tests would wait for it
            raise TimeoutError(f"still running: {words}")
        said = [Path(path).read_text() for path in (out, f"{out}.err")]
        return subprocess.CompletedProcess(words, process.exitcode, *said)


def gift(words: Sequence[str], folder: Path, **env: str) -> str:
    """What `gift WORDS` prints; it must succeed."""
    done = run(["-m", "gift_lightning", *words], folder, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _become(words: list[str], folder: str, env: dict[str, str], log: str) -> None:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for stream, path in ((sys.stdout, log), (sys.stderr, f"{log}.err")):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    if words[0] == "-m":
        sys.argv, sys.path[0:0] = words[1:], [folder]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")
