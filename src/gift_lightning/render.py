"""From records to tokens and labels."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from gift_lightning.functional import IGNORED
from gift_lightning.masks import Chats, Draft, LossOn, runs
from gift_lightning.records import BadRecord, Record, Rejected

Truncation: TypeAlias = Literal["drop", "keep_start", "keep_end", "error"]


@dataclass(frozen=True)
class Rendering:
    """How records become tokens; `SFTData` explains the options."""

    max_length: int | None = 1024
    truncation: Truncation = "drop"  # a cut answer teaches the model not to stop
    loss_on: LossOn = "assistant"
    chat: bool = False
    prompt_format: str = "{prompt}"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 or null, not {self.max_length}.")
        if "{prompt}" not in self.prompt_format:
            raise ValueError(f"prompt_format {self.prompt_format!r} must contain {{prompt}}.")

    def prompt_text(self, prompt: str) -> str:
        return self.prompt_format.replace("{prompt}", prompt)


@dataclass(frozen=True)
class Encoded:
    """One tokenised example; `labels` are not shifted, -100 is not learned, `labels[0]` never."""

    input_ids: list[int]
    labels: list[int]
    notes: tuple[str, ...] = ()
    """What happened to the example on the way, to be counted and shown."""


def encode_all(
    records: Iterable[Record | Rejected],
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    vocab_size: int | None = None,
) -> Iterator[tuple[Record | Rejected, Encoded | Rejected]]:
    """Tokenise records in order, some hundreds at a time; each comes back beside its result.

    Plain text gets the tokenizer's usual prefix (such as BOS) and a learned EOS, each once; in
    chats both are the template's. What a model would have to produce is learned: from the first
    token in which prompt and prompt + completion differ to the end of the turn, its mark included.
    Records with token ids of `vocab_size` or more are rejected.

    Raises:
        ValueError: No chat template or EOS token where one is needed, or an over-long record
            under `truncation="error"`.
    """
    renderer = _Renderer(tokenizer, rendering, vocab_size)
    records = iter(records)
    while chunk := list(islice(records, 512)):
        yield from zip(chunk, renderer.encode(chunk), strict=True)


class _Renderer:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, vocab_size: int | None
    ) -> None:
        self.tokenizer, self.rendering, self.vocab_size = tokenizer, rendering, vocab_size
        self.eos, self.bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        self.chats = Chats(tokenizer, rendering.loss_on, self.check)
        # The tokens that the tokenizer puts before any text: BOS, or none.
        full, bare = tokenizer("a")["input_ids"], self.tokenize(["a"])[0]
        places = range(len(full) - len(bare) + 1)
        heads = (full[:i] for i in places if full[i : i + len(bare)] == bare)
        self.prefix: list[int] = next(heads, [])
        # Texts that cannot fit are not tokenised: a stray file of megabytes would take minutes.
        self.most_characters = None
        if rendering.max_length is not None and rendering.truncation == "drop":
            widest = max(map(len, tokenizer.get_vocab()), default=1)
            self.most_characters = rendering.max_length * widest

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def encode(self, records: list[Record | Rejected]) -> list[Encoded | Rejected]:
        drafts = [_attempt(record.origin, self.draft, record) for record in records]
        todo = [draft for draft in drafts if isinstance(draft, Draft) and draft.ids is None]
        texts = [text for d in todo for text in (d.text, *(d.text[:cut] for cut in d.cuts))]
        tokens = iter(self.tokenize(texts))
        return [
            _attempt(record.origin, self.finish, draft, record.origin, tokens)
            for draft, record in zip(drafts, records, strict=True)
        ]

    def draft(self, record: Record) -> Draft:
        """What to tokenise, and which part of it to learn."""
        if record.input_ids is not None:
            labels = record.labels if record.labels is not None else record.input_ids
            assert len(record.input_ids) == len(labels)
            return Draft(runs(x != IGNORED for x in labels), ids=record.input_ids)
        prompt, completion = record.prompt, record.completion
        for name, part in (("completion", completion), ("prompt", prompt)):
            if isinstance(part, str) and not part.strip():
                raise BadRecord(f"blank {name}")
        if isinstance(prompt, str) and (self.rendering.chat or isinstance(completion, list)):
            turn = record.turn if record.turn is not None else prompt
            prompt = [{"role": "user", "content": self.rendering.prompt_text(turn)}]
        if isinstance(prompt, list) and isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if isinstance(completion, list):
            context = prompt if isinstance(prompt, list) else []
            return self.chats.draft(record, context, completion)
        before = self.rendering.prompt_text(prompt) if isinstance(prompt, str) else ""
        start = 0 if self.rendering.loss_on == "all" else len(before)
        self.check(before + completion, start)
        return Draft([(start, len(before + completion))], before + completion)

    def check(self, text: str, start: int = 0) -> None:
        """Refuse what cannot be tokenised or cannot fit; `start` characters of it are prompt."""
        if self.most_characters is not None and len(text) > self.most_characters:
            which = "prompt longer" if start > self.most_characters else "longer"
            most = self.rendering.max_length
            raise BadRecord(f"{which} than max_length {most}: {len(text)} characters")
        if "\0" in text:
            raise BadRecord("NUL character in the text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord("lone surrogate or undecodable byte in the text") from None

    def finish(self, draft: Draft, origin: str, tokens: Iterator[list[int]]) -> Encoded:
        """Tokens and labels; `tokens` gives those of the text and of its part before each cut."""
        ids, spans, notes = draft.ids, draft.spans, list(draft.notes)
        if ids is None:
            ids = next(tokens)
            at = {0: 0, len(draft.text): len(ids)}
            for cut in draft.cuts:
                before = next(tokens)
                at[cut] = _shared(before, ids)
                if cut == spans[0][0] and at[cut] < len(before):
                    notes.append("the first learned token holds the end of the prompt")
            spans = [(at[start], at[end]) for start, end in spans]
        if not ids:
            raise BadRecord("no token to learn")
        closed = True  # the end is there, as in prepared tokens, or has no place
        if draft.chat:
            ends = [self.chats.end(ids, *span) for span in spans]
            # Text after the last learned turn is another turn: no place for an EOS.
            closed = ends[-1] is not None or spans[-1][1] < len(ids)
            if self.rendering.loss_on != "all":
                spans = [(start, end or b) for (start, b), end in zip(spans, ends, strict=True)]
        labels = [IGNORED] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        if draft.text and not draft.chat:
            closed = ids[-1] == self.eos
            if ids[: len(self.prefix)] != self.prefix:
                ids, labels = self.prefix + ids, [IGNORED] * len(self.prefix) + labels
        if not closed:
            if self.eos is None:
                raise ValueError("The tokenizer has no end-of-sequence token; set its eos_token.")
            ids, labels = [*ids, self.eos], [*labels, self.eos]
        if self.bos is not None and draft.text and ids[:2] == [self.bos, self.bos]:
            ids, labels = ids[1:], labels[1:]
        return self.limit(origin, ids, labels, notes)

    def limit(self, origin: str, ids: list[int], labels: list[int], notes: list[str]) -> Encoded:
        low, high, size = min(ids), max(ids), self.vocab_size
        if size is not None and not 0 <= low <= high < size:
            worst = low if low < 0 else high
            raise BadRecord(f"token id outside the vocabulary: {worst}, not in 0..{size - 1}")
        most, how = self.rendering.max_length, self.rendering.truncation
        if most is not None and len(ids) > most:
            if how == "error":
                raise ValueError(
                    f"{origin} has {len(ids)} tokens, above max_length {most}; raise max_length or "
                    "set truncation to drop, keep_start or keep_end."
                )
            all_prompt = all(label == IGNORED for label in labels[1:most])
            if how == "drop" or (how == "keep_start" and all_prompt):
                which = "prompt longer" if all_prompt else "longer"
                raise BadRecord(f"{which} than max_length {most}: {len(ids)} tokens")
            if how == "keep_start":
                ids, labels = ids[:most], labels[:most]
            else:
                keep = self.prefix if ids[: len(self.prefix)] == self.prefix else []
                keep = keep[: most - 1]
                rest = most - len(keep)
                ids, labels = keep + ids[-rest:], [IGNORED] * len(keep) + labels[-rest:]
            notes.append(f"cut to max_length {most} ({how})")
        labels = [IGNORED, *labels[1:]]
        if all(label == IGNORED for label in labels):
            raise BadRecord("no token to learn")
        return Encoded(ids, labels, tuple(notes))


def _attempt(origin: str, step: Callable[..., Any], item: Any, *more: Any) -> Any:
    """The result of a step, or why the record has none."""
    if isinstance(item, Rejected):
        return item
    try:
        return step(item, *more)
    except BadRecord as error:
        return Rejected(str(error), origin)


def _shared(part: list[int], whole: list[int]) -> int:
    """Length of the common start of two token lists."""
    pairs = enumerate(zip(part, whole, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(part), len(whole)))
