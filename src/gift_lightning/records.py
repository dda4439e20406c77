"""Reading data: every row becomes a `Record`, or a `Rejected` with file, line and reason."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TextIO, TypeAlias, get_args

Messages: TypeAlias = list[dict[str, Any]]
Format: TypeAlias = Literal[
    "auto",
    "messages",
    "prompt_completion",
    "text",
    "alpaca",
    "columns",
    "verl",
    "tokenized",
]

# Column pairs that are taken as prompt and completion when exactly one of them is present.
PAIRS = (("question", "answer"), ("problem", "solution"), ("prompt", "response"))
MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
# The prompts of tatsu-lab/stanford_alpaca, which Alpaca-style base models are tuned on.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


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


@dataclass(frozen=True)
class Record:
    """One training example before tokenisation.

    `completion` is what to learn: text after a `prompt`, a whole text without one, or messages,
    of which the assistant turns are learned (those inside `prompt` are context).
    """

    origin: str
    """`file:line`, or any name to report the record by."""
    completion: str | Messages = ""
    prompt: str | Messages | None = None
    turn: str | None = None
    """The prompt as a chat turn, where it differs from the prompt as plain text."""
    tools: list[Any] | None = None
    input_ids: list[int] | None = None
    """Tokens of a prepared example; prompt and completion are then unused."""
    labels: list[int] | None = None
    """Label per token of a prepared example: its id, or -100 where nothing is learned."""
    source: str = ""
    weight: float = 1.0
    """Uses per epoch."""


@dataclass(frozen=True)
class Rejected:
    """A record that is not used. Rows are counted by the part of `reason` before a colon."""

    reason: str
    origin: str = ""

    @property
    def kind(self) -> str:
        return self.reason.split(":", 1)[0]

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


Row: TypeAlias = tuple[str, dict[str, Any]]


class BadRecord(Exception):
    """Why a row cannot be used."""


def read(source: Source) -> Iterator[Record | Rejected]:
    """Read a source: one `Record` or `Rejected` per row, in file order.

    Raises:
        ValueError: The source does not exist, cannot be read, is empty, or its columns fit no
            format or lack one that was named.
    """
    rows = islice(_rows(source), source.limit)
    head = list(islice(rows, 64))
    if not head:
        raise ValueError(f"{source.path} is empty; give a source with at least one row.")
    good = [row for _, row in (item for item in head if not isinstance(item, Rejected))]
    convert = _converter(source, good) if good else None
    for item in chain(head, rows):
        if isinstance(item, Rejected):
            yield item
            continue
        origin, row = item
        if convert is None:
            convert = _converter(source, [row])
        try:
            yield Record(origin, source=source.path, weight=source.weight, **convert(row))
        except BadRecord as error:
            yield Rejected(str(error), origin)


# --- rows of a file -------------------------------------------------------------------------


def _rows(source: Source) -> Iterator[Row | Rejected]:
    path = Path(source.path)
    if path.is_dir():
        return _folder(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path}: unknown file type; use one of {', '.join(SUFFIXES)}.")
        readers = {".json": _json, ".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
        return readers[path.suffix](source.path)
    if path.suffix in SUFFIXES or not HUB_ID.fullmatch(source.path):
        raise ValueError(f"{source.path} does not exist; check the path of the source.")
    return _hub(source)


def _object(origin: str, value: Any) -> Row | Rejected:
    if isinstance(value, dict):
        return origin, value
    return Rejected(f"not a JSON object: {type(value).__name__}", origin)


def _jsonl(path: str) -> Iterator[Row | Rejected]:
    try:
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
                    yield Rejected(f"not UTF-8: byte {error.start}", origin)
                except RecursionError:
                    yield Rejected("nested too deeply", origin)
                except ValueError as error:
                    yield Rejected(f"invalid JSON: {error}", origin)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _json(path: str) -> Iterator[Row | Rejected]:
    """A file with one JSON list of rows, or with one row per line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = ""  # the line reader reports the bad lines
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if not text.lstrip().startswith("["):
        yield from _jsonl(path)
        return
    decoder, space = json.JSONDecoder(), re.compile(r"[\s,]*")
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        blank = space.match(text, position)
        assert blank is not None
        position = blank.end()
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


def _csv(path: str) -> Iterator[Row | Rejected]:
    try:
        # Undecodable bytes become lone surrogates, which only cost their own row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _csv_rows(path, file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def _csv_rows(path: str, file: TextIO) -> Iterator[Row | Rejected]:
    reader = csv.reader(file, strict=True)
    columns: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if columns is None:
                raise ValueError(f"{origin}: the header cannot be read: {error}.") from error
            yield Rejected(f"invalid CSV: {error} (up to line {reader.line_num})", origin)
            continue
        if not cells:
            continue
        if columns is None:
            columns = cells
        elif len(cells) != len(columns):
            yield Rejected(f"wrong number of cells: {len(cells)}, not {len(columns)}", origin)
        else:
            yield origin, dict(zip(columns, cells, strict=True))


def _parquet(path: str) -> Iterator[Row | Rejected]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {first_line(error)}.") from error


def _folder(source: Source) -> Iterator[Row | Rejected]:
    import datasets

    try:
        data = datasets.load_from_disk(source.path)
    except Exception as error:
        raise ValueError(
            f"{source.path} is not a folder written by datasets.save_to_disk: {first_line(error)}."
        ) from error
    if isinstance(data, datasets.DatasetDict):
        if source.split not in data:
            have = ", ".join(map(str, data))
            raise ValueError(f"{source.path} has no split {source.split!r}; it has {have}.")
        data = data[source.split]
    for number, row in enumerate(data, 1):
        yield f"{source.path}:{number}", dict(row)


def _hub(source: Source) -> Iterator[Row | Rejected]:
    import datasets

    name, _, config = source.path.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=source.split)
    except Exception as error:
        raise ValueError(
            f"{source.path} is no local file and cannot be loaded from the hub: "
            f"{first_line(error)}."
        ) from error
    for number, row in enumerate(data, 1):
        yield f"{source.path}:{number}", dict(row)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- one row --------------------------------------------------------------------------------

Converter: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]


def _converter(source: Source, rows: list[dict[str, Any]]) -> Converter:
    columns: dict[str, None] = {}
    for row in rows:
        columns.update(dict.fromkeys(row))
    form = source.format if source.format != "auto" else _detect(source, columns)
    prompt, completion = source.prompt, source.completion

    def need(*names: str) -> None:
        for name in names:
            if name not in columns:
                have = ", ".join(map(str, columns)) or "none"
                raise ValueError(
                    f"{source.path}: no column {name!r} for format {form!r}; it has {have}."
                )

    if form == "messages":
        name = prompt or ("messages" if "messages" in columns else "conversations")
        if prompt is None and name not in columns:
            need("messages")
        need(name)
        return lambda row: {"completion": _messages(row, name), "tools": _tools(row)}
    if form == "text":
        name = completion or "text"
        need(name)
        return lambda row: {"completion": _text(row, name)}
    if form == "alpaca":
        need("instruction", "output")
        return _alpaca
    if form == "tokenized":
        need("input_ids")
        return _tokenized
    if form == "verl":
        need(prompt or "prompt", "reward_model")
        if completion is not None:
            need(completion)
        return lambda row: _verl(row, prompt or "prompt", completion)
    if form == "prompt_completion":
        prompt, completion = prompt or "prompt", completion or "completion"
    elif prompt is None or completion is None:
        pair = _pair(source, columns)
        prompt, completion = prompt or pair[0], completion or pair[1]
    need(prompt, completion)
    return lambda row: _pair_row(row, prompt, completion)


def _detect(source: Source, columns: Iterable[str]) -> Format:
    has = set(columns)
    if {"prompt", "reward_model", "data_source"} <= has:
        return "verl"
    if source.prompt or source.completion:
        return "columns"
    if "input_ids" in has:
        return "tokenized"
    if has & {"messages", "conversations"}:
        return "messages"
    if {"prompt", "completion"} <= has:
        return "prompt_completion"
    if {"instruction", "output"} <= has:
        return "alpaca"
    if any(set(pair) <= has for pair in PAIRS):
        return "columns"
    if "text" in has:
        return "text"
    have = ", ".join(map(str, columns)) or "none"
    raise ValueError(
        f"{source.path}: its columns ({have}) fit no known format; "
        "name two of them with prompt= and completion=."
    )


def _pair(source: Source, columns: Iterable[str]) -> tuple[str, str]:
    pairs = [pair for pair in PAIRS if set(pair) <= set(columns)]
    if len(pairs) == 1:
        return pairs[0]
    have = ", ".join(map(str, columns)) or "none"
    raise ValueError(
        f"{source.path}: which columns hold prompt and completion? "
        f"Name both with prompt= and completion=; it has {have}."
    )


def _get(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise BadRecord(f"no field {name!r}")
    if row[name] is None:
        raise BadRecord(f"field {name!r} is null")
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _get(row, name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise BadRecord(f"field {name!r} is not text: {type(value).__name__}")
    return value


def _text_or_messages(row: dict[str, Any], name: str) -> str | Messages:
    return _messages(row, name) if isinstance(row.get(name), list) else _text(row, name)


def _pair_row(row: dict[str, Any], prompt: str, completion: str) -> dict[str, Any]:
    return {
        "prompt": _text_or_messages(row, prompt),
        "completion": _text_or_messages(row, completion),
        "tools": _tools(row),
    }


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _text(row, "input") if row.get("input") is not None else ""
    if not context.strip():
        return {
            "prompt": ALPACA.replace("{instruction}", instruction),
            "turn": instruction,
            "completion": output,
        }
    before, _, after = ALPACA_INPUT.partition("{instruction}")
    return {
        "prompt": before + instruction + after.replace("{input}", context),
        "turn": f"{instruction}\n\n{context}",
        "completion": output,
    }


def _verl(row: dict[str, Any], prompt: str, completion: str | None) -> dict[str, Any]:
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    for place in (row, extra):
        for name in (completion,) if completion else ("response", "answer"):
            if place.get(name) is not None:
                return {
                    "prompt": _text_or_messages(row, prompt),
                    "completion": _text_or_messages(place, name),
                }
    if completion:
        raise BadRecord(f"no field {completion!r}")
    raise BadRecord("no completion: name its column with completion= (not in reward_model)")


def _tokenized(row: dict[str, Any]) -> dict[str, Any]:
    ids = _integers(row, "input_ids")
    present = [name for name in MASKS if row.get(name) is not None]
    labels = list(ids)
    if present:
        mask = _integers(row, present[0])
        if len(mask) != len(ids):
            raise BadRecord(f"lengths differ: {len(ids)} input_ids, {len(mask)} {present[0]}")
        if present[0] == "labels":
            labels = mask
        else:
            labels = [i if keep else -100 for i, keep in zip(ids, mask, strict=True)]
    if any(label not in (i, -100) for i, label in zip(ids, labels, strict=True)):
        raise BadRecord("a label is neither -100 nor its own input id: labels must not be shifted")
    if row.get("attention_mask") is not None:
        real = _integers(row, "attention_mask")
        if len(real) != len(ids):
            raise BadRecord(f"lengths differ: {len(ids)} input_ids, {len(real)} attention_mask")
        ids = [i for i, keep in zip(ids, real, strict=True) if keep]
        labels = [i for i, keep in zip(labels, real, strict=True) if keep]
    return {"input_ids": ids, "labels": labels}


def _integers(row: dict[str, Any], name: str) -> list[int]:
    value = _get(row, name)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {name!r} is not a list of integers")
    if any(not isinstance(i, int) for i in value):
        raise BadRecord(f"field {name!r} is not a list of integers")
    return [int(i) for i in value]


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise BadRecord("field 'tools' is not a JSON list") from None
    if tools is not None and not isinstance(tools, list):
        raise BadRecord(f"field 'tools' is not a list: {type(tools).__name__}")
    return tools or None


def _messages(row: dict[str, Any], name: str) -> Messages:
    value = _get(row, name)
    if not isinstance(value, list) or not value:
        raise BadRecord(f"field {name!r} is not a list of messages")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRecord(f"a message is not an object: {type(message).__name__}")
    if "from" in message and "role" not in message:  # ShareGPT
        role = ROLES.get(message["from"]) if isinstance(message["from"], str) else None
        message = {"role": role, "content": message.get("value")}
        if role is None:
            raise BadRecord("a message has an unknown 'from'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise BadRecord("a message has no role")
    if isinstance(content, list):  # parts, as in multi-modal chats
        if any(not isinstance(p, dict) or not isinstance(p.get("text"), str) for p in content):
            raise BadRecord("a message holds something other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise BadRecord(f"the content of a message is not text: {type(content).__name__}")
    # Parquet gives every message the union of all keys: absent ones come back as None.
    kept = {key: item for key, item in message.items() if item is not None}
    return {**kept, "content": content} if content is not None else kept
