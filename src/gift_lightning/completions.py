"""The samples of an evaluation as a parquet file, and what a base model solved in one."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from gift_lightning.problems import Problem, prompt_text
from gift_lightning.readers import first_line

Row: TypeAlias = dict[str, Any]
"""One sample: set, problem (its place in the set), prompt, completion, answer, reward (NaN if it
could not be judged), correct, truncated."""

Solved: TypeAlias = dict[str, dict[str, list[int]]]
"""By set and prompt: samples drawn, and how many of them were right."""

_SETTINGS = b"gift_lightning"  # metadata of the file


def write(
    folder: Path, kind: str, step: int, rows: Sequence[Row], settings: Mapping[str, Any]
) -> Path:
    """Writes ``<kind>-<step>.parquet``, under another name where a file has it already."""
    import pyarrow
    import pyarrow.parquet

    types = {
        "step": pyarrow.int64(),
        "set": pyarrow.string(),
        "problem": pyarrow.int64(),
        "prompt": pyarrow.string(),
        "completion": pyarrow.string(),
        "answer": pyarrow.string(),
        "reward": pyarrow.float64(),
        "correct": pyarrow.bool_(),
        "truncated": pyarrow.bool_(),
    }
    schema = pyarrow.schema(types, metadata={_SETTINGS: json.dumps(dict(settings))})
    table = pyarrow.Table.from_pylist([{"step": step, **row} for row in rows], schema=schema)
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{kind}-{step:08d}.parquet", 0
    while path.exists():
        number += 1
        path = folder / f"{kind}-{step:08d}-{number}.parquet"
    unfinished = path.with_suffix(".tmp")
    pyarrow.parquet.write_table(table, unfinished)
    os.replace(unfinished, path)
    return path


def solved(rows: Iterable[Row]) -> Solved:
    """Counts of each problem; two of the same prompt are one."""
    found: Solved = {}
    for row in rows:
        counts = found.setdefault(row["set"], {}).setdefault(row["prompt"], [0, 0])
        counts[0] += 1
        counts[1] += row["correct"]
    return found


def read_solved(
    path: str,
    sets: Mapping[str, Sequence[Problem]],
    settings: Mapping[str, Any],
    num_samples: int,
) -> Solved:
    """What a written evaluation solved of `sets`.

    Raises:
        ValueError: it cannot be read, was sampled with other settings, or lacks a problem or
            `num_samples` samples of one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["set", "prompt", "correct"])
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"GenerationEval.baseline: {path} cannot be read ({first_line(error)}): give a "
            "completions/*.parquet file of a run."
        ) from error
    theirs = json.loads((table.schema.metadata or {}).get(_SETTINGS, b"{}"))
    for name, value in settings.items():
        if theirs.get(name) != value:
            raise ValueError(
                f"GenerationEval.baseline: {path} was written with {name}={theirs.get(name)}, "
                f"not {value}: evaluate the base again with the settings of this run."
            )
    found = solved(table.to_pylist())
    for name, problems in sets.items():
        for problem in problems:
            drawn = found.get(name, {}).get(prompt_text(problem.prompt), [0, 0])[0]
            if drawn < num_samples:
                raise ValueError(
                    f"GenerationEval.baseline: {path} has {drawn} samples of {problem.origin} in "
                    f"the set {name!r}, fewer than group_size={num_samples}: evaluate the base "
                    "on the sets of this run."
                )
    return found
