"""From rows to records: every row becomes a `Record`, or a `Rejected` with its reason."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, compress, islice, product
from typing import Any, TypeAlias

from gift_lightning.functional import IGNORED
from gift_lightning.readers import Format, Source, rows

Messages: TypeAlias = list[dict[str, Any]]

# What each format reads: columns of prompt (or messages) and completion, which a source may name
# otherwise (None: not read, "": not needed), and more. The first that fits the columns is taken.
LAYOUTS: list[tuple[Format, str | None, str | None, set[str]]] = [
    ("verl", "prompt", "", {"reward_model"}),
    ("tokenized", None, None, {"input_ids"}),
    ("messages", "messages", None, set()),
    ("messages", "conversations", None, set()),
    ("prompt_completion", "prompt", "completion", set()),
    ("alpaca", None, None, {"instruction", "output"}),
    ("columns", "question", "answer", set()),
    ("columns", "problem", "solution", set()),
    ("columns", "prompt", "response", set()),
    ("text", None, "text", set()),
]
MASKS = ("labels", "loss_mask", "completion_mask", "assistant_masks", "assistant_mask")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
ROLES |= {"observation": "tool", **{role: role for role in ("system", "user", "assistant", "tool")}}
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


class BadRecord(Exception):
    """Why a row cannot be used."""


def read(source: Source) -> Iterator[Record | Rejected]:
    """Read a source: one `Record` or `Rejected` per row, in file order.

    Raises:
        ValueError: The source does not exist, cannot be read, is empty, or its columns fit no
            format or lack one that was named.
    """
    all_rows = islice(rows(source), source.limit)
    head = list(islice(all_rows, 64))
    if not head:
        raise ValueError(f"{source.path} is empty; give a source with at least one row.")
    good = [row for _, row in head if not isinstance(row, str)]
    layout: tuple[Format, str, str] | None = None
    for origin, row in chain(head, all_rows):
        if isinstance(row, str):
            yield Rejected(row, origin)
            continue
        layout = layout or _layout(source, good or [row])
        try:
            fields = _fields(row, *layout)
            yield Record(origin, source=source.path, weight=source.weight, **fields)
        except BadRecord as error:
            yield Rejected(str(error), origin)


def _layout(source: Source, some: list[dict[str, Any]]) -> tuple[Format, str, str]:
    """The format of a source, and its columns of prompt (or messages) and completion, if any."""
    columns = dict.fromkeys(name for row in some for name in row)
    have, form = ", ".join(map(str, columns)) or "none", source.format
    fits = [x for x in LAYOUTS if {*filter(None, x[1:3]), *x[3]} <= columns.keys()]
    fits = [x for x in fits if x[0] != "verl" or "data_source" in columns]
    if form == "auto":
        named = bool(source.prompt or source.completion)
        if not fits and not named:
            raise ValueError(
                f"{source.path}: its columns ({have}) fit no known format; "
                "name two of them with prompt= and completion=."
            )
        form = "columns" if named and (not fits or fits[0][0] != "verl") else fits[0][0]
    fits = [x for x in fits if x[0] == form]
    if form == "columns" and len(fits) != 1 and None in (source.prompt, source.completion):
        raise ValueError(
            f"{source.path}: which columns hold prompt and completion? "
            f"Name both with prompt= and completion=; it has {have}."
        )
    _, prompt, completion, more = [*fits, *(x for x in LAYOUTS if x[0] == form)][0]
    prompt = "" if prompt is None else source.prompt or prompt
    completion = "" if completion is None else source.completion or completion
    for name in (prompt, *sorted(more), completion):
        if name and name not in columns:
            raise ValueError(
                f"{source.path}: no column {name!r} for format {form!r}; it has {have}."
            )
    return form, prompt, completion


def _fields(row: dict[str, Any], form: Format, prompt: str, completion: str) -> dict[str, Any]:
    """What a row says about its `Record`."""
    if form == "alpaca":
        return _alpaca(row)
    if form == "tokenized":
        return _tokenized(row)
    if form == "verl":
        return _verl(row, prompt, completion)
    if form == "text":
        return {"completion": _text(row, completion)}
    if form == "messages":
        return {"completion": _messages(row, prompt), "tools": _tools(row)}
    pair = {"prompt": _content(row, prompt), "completion": _content(row, completion)}
    return {**pair, "tools": _tools(row)}


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    instruction, output = _text(row, "instruction"), _text(row, "output")
    context = _text(row, "input") if row.get("input") is not None else ""
    prompt, turn = ALPACA, instruction
    if context.strip():
        prompt, turn = ALPACA_INPUT, f"{instruction}\n\n{context}"
    prompt = prompt.format(instruction=instruction, input=context)
    return {"prompt": prompt, "turn": turn, "completion": output}


def _verl(row: dict[str, Any], prompt: str, completion: str) -> dict[str, Any]:
    extra = row.get("extra_info")
    places = [row, extra] if isinstance(extra, dict) else [row]
    for place, name in product(places, [completion] if completion else ["response", "answer"]):
        if place.get(name) is not None:
            return {"prompt": _content(row, prompt), "completion": _content(place, name)}
    if completion:
        raise BadRecord(f"no field {completion!r}")
    raise BadRecord("no completion: name its column with completion= (not in reward_model)")


def _tokenized(row: dict[str, Any]) -> dict[str, Any]:
    ids = _integers(row, "input_ids")
    given = next((name for name in MASKS if row.get(name) is not None), "input_ids")
    labels = _integers(row, given, len(ids))
    if given not in ("input_ids", "labels"):
        labels = [i if keep else IGNORED for i, keep in zip(ids, labels, strict=True)]
    if any(label not in (i, IGNORED) for i, label in zip(ids, labels, strict=True)):
        raise BadRecord("a label is neither -100 nor its own input id: labels must not be shifted")
    if row.get("attention_mask") is not None:
        real = _integers(row, "attention_mask", len(ids))
        ids, labels = list(compress(ids, real)), list(compress(labels, real))
    return {"input_ids": ids, "labels": labels}


def _integers(row: dict[str, Any], name: str, length: int | None = None) -> list[int]:
    value = _get(row, name)
    if not (value and isinstance(value, list) and all(isinstance(i, int) for i in value)):
        raise BadRecord(f"field {name!r} is not a list of integers")
    if length is not None and len(value) != length:
        raise BadRecord(f"lengths differ: {length} input_ids, {len(value)} {name}")
    return [int(i) for i in value]


def _get(row: dict[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise BadRecord(f"field {name!r} is null" if name in row else f"no field {name!r}")
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _get(row, name)
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return str(value)
    if not isinstance(value, str):
        raise BadRecord(f"field {name!r} is not text: {type(value).__name__}")
    return value


def _content(row: dict[str, Any], name: str) -> str | Messages:
    return _messages(row, name) if isinstance(_get(row, name), list) else _text(row, name)


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
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
        role = ROLES.get(str(message["from"]))
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
