"""Tokenised records, kept on disk: a second start reads them instead of making them again.

A file holds the tokens of one list of records under a name that is a hash of everything that they
follow from: the records' content, the tokenizer and its template, the options of rendering, and the
code that renders. What changes gets another name, so that nothing is ever stale. A file is
safetensors, never unpickled, and appears whole or not at all; a damaged one is made again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import tokenizers
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from gift_lightning.examples import Examples
from gift_lightning.records import Record, Rejected
from gift_lightning.render import Rendering, encode_all

WORTH = 1000  # records; fewer are tokenised as fast as read
_CODE = ("masks.py", "render.py", "tokenised.py")


@dataclass(frozen=True)
class Tokenised:
    """What became of a list of records.

    Attributes:
        examples: the tokens of those that are used, in order.
        rejected: why the others are not, by their place in the list.
        notes: what happened to used records on the way.
        file: where all this was read from, if it was not made now.
    """

    examples: Examples
    rejected: dict[int, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    file: Path | None = None


def tokenise(
    records: Sequence[Record | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    vocab_size: int,
) -> Tokenised:
    """What `encode_all` makes of the records, from the cache's folder if it is there.

    Raises:
        ValueError: as `encode_all`.
    """
    file = _file(records, tokenizer, rendering, vocab_size)
    found = None if file is None else _read(file)
    if found is not None:
        return found
    rejected: dict[int, str] = {}
    notes: Counter[str] = Counter()

    def samples() -> Iterator[tuple[list[int], list[int]]]:
        results = encode_all(records, tokenizer, rendering, vocab_size)
        for i, (_, result) in enumerate(results):
            if isinstance(result, Rejected):
                rejected[i] = result.reason
            else:
                notes.update(result.notes)
                yield result.input_ids, result.labels

    made = Tokenised(Examples.of(samples()), rejected, notes)
    if file is not None:
        _write(file, made)
    return made


def folder() -> Path | None:
    """Where tokens are kept: in $GIFT_CACHE, by default in the user's cache; None if it is ""."""
    said = os.environ.get("GIFT_CACHE")
    if said == "":
        return None
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(said or f"{user}/gift-lightning").expanduser() / "tokenised"


def _file(
    records: Sequence[Record | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    vocab_size: int,
) -> Path | None:
    """Where the tokens belong, or None if they are not kept."""
    root, backend = folder(), getattr(tokenizer, "backend_tokenizer", None)
    # A tokenizer without a backend is code, which has no name by its content.
    if root is None or backend is None or len(records) < WORTH:
        return None
    tokenizer("a")  # takes truncation and padding of an earlier call out of the backend
    template = str(tokenizer.chat_template)
    made_by = {
        "rendering": asdict(rendering),
        "vocab_size": vocab_size,
        "special": {name: str(x) for name, x in tokenizer.special_tokens_map.items()},
        "split_special_tokens": tokenizer.split_special_tokens,
        "template": template,
        "today": str(date.today()) if "strftime_now" in template else "",  # Llama 3 renders it
        "versions": [transformers.__version__, tokenizers.__version__],
        "code": [(Path(__file__).parent / name).read_text() for name in _CODE],
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())
    digest.update(backend.to_str().encode())
    for record in records:
        digest.update(_content(record).encode("utf-8", "surrogatepass"))
    return root / f"{digest.hexdigest()[:32]}.safetensors"


def _content(record: Record | Rejected) -> str:
    """All that tokens depend on; where a record is from, and its weight, may change."""
    if isinstance(record, Rejected):
        return repr(record.reason)
    r = record
    return repr((r.completion, r.prompt, r.turn, r.tools, r.input_ids, r.labels))


def _read(file: Path) -> Tokenised | None:
    """What a file holds, or None if there is none or it is damaged."""
    try:
        with safe_open(file, framework="np") as content:
            arrays = [content.get_tensor(name) for name in ("lengths", "ids", "learned")]
            said = content.metadata()
        examples = Examples(*arrays)
        if said["digest"] != _digest(examples, said["rejected"], said["notes"]):
            return None
        rejected = {int(i): reason for i, reason in json.loads(said["rejected"]).items()}
        return Tokenised(examples, rejected, Counter(json.loads(said["notes"])), file)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, IndexError):
        return None


def _write(file: Path, made: Tokenised) -> None:
    """Keeps the tokens if the folder can be written: a run does without."""
    said = {"rejected": json.dumps(made.rejected), "notes": json.dumps(made.notes)}
    said["digest"] = _digest(made.examples, *said.values())
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(made.examples.arrays, part, said)
        os.replace(part, file)
    except (OSError, SafetensorError):
        with suppress(OSError):
            part.unlink()


def _digest(examples: Examples, *said: str) -> str:
    return hashlib.sha256("\0".join([examples.digest, *said]).encode()).hexdigest()
