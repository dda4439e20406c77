"""`done.json`: what a finished run leaves behind, and what has changed since."""

import json
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gift_lightning.experiment import Run

_PACKAGES = ("gift-lightning", "torch", "lightning", "transformers", "peft")
_SHOWN = 3


def write_receipt(run: Run, command: list[str], seconds: float, threads: str) -> None:
    """Says that a run has finished: the last thing that is written, and all of it or nothing."""
    versions = {"python": sys.version.split()[0]}
    receipt = {
        "arm": run.arm,
        "seed": run.seed,
        "stage": run.name,
        "exit_code": 0,
        "seconds": round(seconds, 3),
        "threads": threads,
        "command": command,
        "versions": {**versions, **{name: version(name) for name in _PACKAGES}},
        "key": run.key,
        "inputs": run.inputs,
    }
    write_json(run.folder / "done.json", receipt)


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a finished run, None if it has not finished."""
    try:
        receipt = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return receipt if isinstance(receipt, dict) and "inputs" in receipt else None


def changes(run: Run, receipt: dict[str, Any] | None) -> list[str]:
    """What is different between a finished run and what would be run now; the first few of it."""
    if receipt is None or receipt.get("key") == run.key:
        return []
    was = dict(_leaves(receipt["inputs"]))
    now = dict(_leaves(json.loads(json.dumps(run.inputs, default=str))))
    found = []
    for name in dict.fromkeys([*was, *now]):
        if was.get(name, _ABSENT) == now.get(name, _ABSENT):
            continue
        part, _, key = name.partition(" ")
        if part == "reads":
            found.append(f"stage {key}, which it reads, has changed")
        else:
            there, here = (json.dumps(x[name]) if name in x else "unset" for x in (was, now))
            found.append(f"{key or part} was {there} and is {here}")
    rest = len(found) - _SHOWN
    return found[:_SHOWN] + ([f"{rest} more changes"] if rest > 0 else [])


_ABSENT = object()


def _leaves(inputs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    def walk(value: Any, name: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, f"{name}.{key}" if name else str(key))
        else:
            yield name, value

    for part, value in inputs.items():
        for name, leaf in walk(value, ""):
            yield f"{part} {name}".strip(), leaf


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, whatever kills the process."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
