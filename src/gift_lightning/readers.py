"""Where data comes from: files, folders and hub datasets, read row by row."""

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

Row: TypeAlias = tuple[str, dict[str, Any] | str]
"""Where a row is from (`file:line`), and its fields or the reason why they cannot be read."""

Format: TypeAlias = Literal[
    "auto", "messages", "prompt_completion", "text", "alpaca", "columns", "verl", "tokenized"
]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass
class Source:
    """Where training or validation data comes from."""

    path: str
    """A .json, .jsonl, .csv or .parquet file, a folder of datasets.save_to_disk, or a hub id
    (owner/name, or owner/name:config)."""
    split: str = "train"
    """Split of a hub dataset, or of a saved folder that holds several."""
    weight: float = 1.0
    """How often each record is used per epoch: 2 = twice, 0.5 = one half, chosen by the seed."""
    format: Format = "auto"
    """Layout of the rows; auto looks at the columns."""
    prompt: str | None = None
    """Column that holds the prompt, for layouts other than the usual ones."""
    completion: str | None = None
    """Column that holds the completion to learn."""
    limit: int | None = None
    """Read only this many rows from the start."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("A source needs a path: a data file, a folder or a hub id.")
        if self.format not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ValueError(f"{self.path}: unknown format {self.format!r}; choose from {known}.")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"{self.path}: weight must be above 0, not {self.weight}.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"{self.path}: limit must be at least 1, not {self.limit}.")


def rows(source: Source) -> Iterator[Row]:
    """The rows of a source, in order, all of them.

    Raises:
        ValueError: It does not exist, or cannot be read as a whole.
    """
    path, suffix = source.path, Path(source.path).suffix
    if Path(path).is_file():
        if suffix not in READERS:
            raise ValueError(f"{path}: unknown file type; use one of {', '.join(READERS)}.")
        try:
            yield from READERS[suffix](path)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    elif Path(path).is_dir() or (suffix not in READERS and HUB_ID.fullmatch(path)):
        yield from _dataset(path, source.split)
    else:
        raise ValueError(f"{path} does not exist; check the path of the source.")


def _object(origin: str, value: Any) -> Row:
    is_object = isinstance(value, dict)
    return origin, value if is_object else f"not a JSON object: {type(value).__name__}"


def _jsonl(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            origin = f"{path}:{number}"
            try:
                yield _object(origin, json.loads(line.decode("utf-8")))
            except UnicodeDecodeError as error:
                yield origin, f"not UTF-8: byte {error.start}"
            except RecursionError:
                yield origin, "nested too deeply"
            except ValueError as error:
                yield origin, f"invalid JSON: {error}"


def _json(path: str) -> Iterator[Row]:
    """A file with one JSON list of rows, or with one row per line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = ""  # the line reader reports the bad lines
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        position = space.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{line}: the JSON list cannot be read from here on ({error}); "
                "repair it, or use one row per line (.jsonl)."
            ) from error
        yield _object(f"{path}:{line}", value)


def _csv(path: str) -> Iterator[Row]:
    # Undecodable bytes become lone surrogates, which only cost their own row.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] = []
        while True:
            origin = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if not columns:
                    raise ValueError(f"{origin}: the header cannot be read: {error}.") from error
                yield origin, f"invalid CSV: {error} (up to line {reader.line_num})"
                continue
            if cells is None:
                return
            if not columns:
                columns = cells
            elif len(cells) == len(columns):
                yield origin, dict(zip(columns, cells, strict=True))
            elif cells:  # not a blank line
                yield origin, f"wrong number of cells: {len(cells)}, not {len(columns)}"


def _parquet(path: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1024))
            for number, row in enumerate(chain.from_iterable(batches), 1):
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {first_line(error)}.") from error


def _dataset(path: str, split: str) -> Iterator[Row]:
    import datasets

    saved = Path(path).is_dir()
    name, _, config = path.partition(":")
    try:
        if saved:
            data = datasets.load_from_disk(path)
        else:
            data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:
        what = "is no local file and cannot be loaded from the hub"
        what = "is not a folder written by datasets.save_to_disk" if saved else what
        raise ValueError(f"{path} {what}: {first_line(error)}.") from error
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            have = ", ".join(map(str, data))
            raise ValueError(f"{path} has no split {split!r}; it has {have}.")
        data = data[split]
    for number, row in enumerate(data, 1):
        yield f"{path}:{number}", dict(row)


READERS = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
