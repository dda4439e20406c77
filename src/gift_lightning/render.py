"""From records to tokens and labels: which tokens a model learns, and which it only reads."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from gift_lightning.records import BadRecord, Messages, Record, Rejected, first_line

LossOn: TypeAlias = Literal["assistant", "last", "all"]
Truncation: TypeAlias = Literal["drop", "keep_start", "keep_end", "error"]

IGNORE = -100
GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True)
class Rendering:
    """How records become tokens."""

    max_length: int | None = 1024
    """Most tokens of one example; null for no limit."""
    truncation: Truncation = "drop"
    """What to do with longer ones. A cut answer teaches the model not to stop, hence drop."""
    loss_on: LossOn = "assistant"
    """Learn every completion and assistant turn, only the last assistant turn, or all tokens."""
    chat: bool = False
    """Make plain prompts and completions one user and one assistant turn of the chat template."""
    prompt_format: str = "{prompt}"
    """Text around a plain prompt, for example "Question: {prompt} Answer:"."""

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


def encode(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Rendering,
    vocab_size: int | None = None,
) -> Encoded | Rejected:
    """Tokenise one record; see `encode_all`."""
    return next(encode_all([record], tokenizer, rendering, vocab_size))[1]


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

    Args:
        records: What to tokenise; rows that are rejected already pass through.
        tokenizer: A Hugging Face tokenizer, with a chat template if there are chats.
        rendering: Options.
        vocab_size: Rows of the model's embedding; records with other token ids are rejected.

    Raises:
        ValueError: No chat template or EOS token where one is needed, or an over-long record
            under `truncation="error"`.
    """
    renderer = _Renderer(tokenizer, rendering, vocab_size)
    records = iter(records)
    while chunk := list(islice(records, 512)):
        yield from zip(chunk, renderer.chunk(chunk), strict=True)


@dataclass
class _Draft:
    """A record whose characters, or tokens, to learn are known."""

    origin: str
    text: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Characters to learn; token positions if `ids` is set."""
    ids: list[int] | None = None
    chat: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def cuts(self) -> list[int]:
        """Where inside the text a span starts or ends."""
        inside = {cut for span in self.spans for cut in span} - {0, len(self.text)}
        return sorted(inside)


class _Renderer:
    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, rendering: Rendering, vocab_size: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.rendering = rendering
        self.vocab_size = vocab_size
        self.eos = tokenizer.eos_token_id
        self.bos = tokenizer.bos_token_id
        added = tokenizer.added_tokens_decoder.items()
        self.special = set(tokenizer.all_special_ids) | {i for i, t in added if t.special}
        self.prefix = self._prefix()
        # Texts that cannot fit are not tokenised: a stray file of megabytes would take minutes.
        fits = rendering.max_length is None or rendering.truncation != "drop"
        self.most = None if fits else rendering.max_length
        self.widest = max(map(len, tokenizer.get_vocab()), default=1)

    def _prefix(self) -> list[int]:
        """The tokens that the tokenizer puts before any text: BOS, or none."""
        full, bare = self.tokenizer("a")["input_ids"], self.tokenize(["a"])[0]
        for start in range(len(full) - len(bare) + 1):
            if bare and full[start : start + len(bare)] == bare:
                return list(full[:start])
        return []

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def chunk(self, records: list[Record | Rejected]) -> list[Encoded | Rejected]:
        drafts: list[_Draft | Rejected] = []
        texts: list[str] = []
        for record in records:
            if isinstance(record, Rejected):
                drafts.append(record)
                continue
            try:
                draft = self.draft(record)
            except BadRecord as error:
                drafts.append(Rejected(str(error), record.origin))
                continue
            drafts.append(draft)
            if draft.ids is None:
                texts += [draft.text, *(draft.text[:cut] for cut in draft.cuts)]
        tokens = iter(self.tokenize(texts))
        done: list[Encoded | Rejected] = []
        for item in drafts:
            if isinstance(item, Rejected):
                done.append(item)
                continue
            try:
                done.append(self.finish(item, tokens))
            except BadRecord as error:
                done.append(Rejected(str(error), item.origin))
        return done

    # --- what to learn ----------------------------------------------------------------------

    def draft(self, record: Record) -> _Draft:
        if record.input_ids is not None:
            return self.prepared(record)
        prompt, completion = record.prompt, record.completion
        if isinstance(completion, str) and not completion.strip():
            raise BadRecord("blank completion")
        if isinstance(prompt, str) and not prompt.strip():
            raise BadRecord("blank prompt")
        if isinstance(prompt, str) and (self.rendering.chat or not isinstance(completion, str)):
            turn = record.turn if record.turn is not None else prompt
            prompt = [{"role": "user", "content": self.rendering.prompt_text(turn)}]
        if isinstance(prompt, list) or isinstance(completion, list):
            context = prompt if isinstance(prompt, list) else []
            if isinstance(completion, str):
                completion = [{"role": "assistant", "content": completion}]
            draft = self.conversation(record, [*context, *completion], len(context))
        elif prompt is None:
            draft = _Draft(record.origin, completion, [(0, len(completion))])
        else:
            before = self.rendering.prompt_text(prompt)
            start = 0 if self.rendering.loss_on == "all" else len(before)
            draft = _Draft(record.origin, before + completion, [(start, len(before + completion))])
        self.check_text(draft.text, draft.spans[0][0])
        return draft

    def check_text(self, text: str, start: int = 0) -> None:
        """Refuse what cannot be tokenised or cannot fit; `start` characters of it are prompt."""
        if self.most is not None and len(text) > self.most * self.widest:
            which = "prompt longer" if start > self.most * self.widest else "longer"
            raise BadRecord(f"{which} than max_length {self.most}: {len(text)} characters")
        if "\0" in text:
            raise BadRecord("NUL character in the text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRecord("lone surrogate or undecodable byte in the text") from None

    def prepared(self, record: Record) -> _Draft:
        ids = record.input_ids or []
        labels = record.labels if record.labels is not None else ids
        assert len(ids) == len(labels)
        return _Draft(record.origin, ids=list(ids), spans=_runs([x != IGNORE for x in labels]))

    def conversation(self, record: Record, messages: Messages, first: int) -> _Draft:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{record.origin} is a chat, but the tokenizer has no chat template; "
                "use a chat model's tokenizer or plain prompt and completion columns."
            )
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        learned = [i for i in turns if i >= first]
        if not learned:
            raise BadRecord("no assistant turn to learn")
        for i in learned:
            if not messages[i].get("tool_calls") and not messages[i]["content"].strip():
                raise BadRecord("blank completion")
        if self.rendering.loss_on == "last":
            learned = learned[-1:]

        text = self.template(record, messages)
        self.check_text(text)
        if self.rendering.loss_on == "all":
            return _Draft(record.origin, text, [(0, len(text))], chat=True)
        if GENERATION.search(str(self.tokenizer.get_chat_template(tools=record.tools))):
            out = self.template(record, messages, marks=True)
            runs = _runs(out["assistant_masks"])
            if len(runs) == len(turns):
                ids = list(out["input_ids"])
                runs = self.with_ends(ids, runs, open_end=turns[-1] == len(messages) - 1)
                spans = [runs[turns.index(i)] for i in learned]
                return _Draft(record.origin, ids=ids, spans=spans, chat=True)

        spans, notes = [], []
        for i in reversed(learned):
            span = self.turn(record, messages, i, text)
            if span is not None:
                spans.append(span)
                continue
            if not spans:
                raise BadRecord("the chat template hides where the last assistant turn starts")
            notes.append("only the last assistant turn is learned (the template rewrites others)")
            spans = spans[:1]
            break
        return _Draft(record.origin, text, spans[::-1], chat=True, notes=notes)

    def turn(self, record: Record, messages: Messages, i: int, text: str) -> tuple[int, int] | None:
        """The characters of one assistant turn, if rendering is incremental there."""
        if i == 0:
            raise BadRecord("the conversation starts with an assistant turn")
        before = self.template(record, messages[:i], add_generation_prompt=True)
        last = i == len(messages) - 1
        after = text if last else self.template(record, messages[: i + 1])
        if not (text.startswith(after) and after.startswith(before) and len(after) > len(before)):
            return None
        # An empty thinking block is the template's way to say "no thinking", not an answer.
        thinking = EMPTY_THINKING.match(text, len(before))
        return (thinking.end() if thinking else len(before)), len(after)

    def template(
        self, record: Record, messages: Messages, marks: bool = False, **options: Any
    ) -> Any:
        """The rendered text, or tokens with the template's own marks of assistant turns."""
        if marks:
            options = {"return_dict": True, "return_assistant_tokens_mask": True}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=record.tools, tokenize=marks, **options
            )
        except Exception as error:  # a template is code of others, and raises what it likes
            raise BadRecord(f"the chat template raised: {first_line(error)}") from error

    # --- tokens and labels ------------------------------------------------------------------

    def finish(self, draft: _Draft, tokens: Iterator[list[int]]) -> Encoded | Rejected:
        notes = list(draft.notes)
        if draft.ids is not None:
            ids, spans = draft.ids, draft.spans
        else:
            ids = list(next(tokens))
            before = {cut: next(tokens) for cut in draft.cuts}
            at = {cut: _shared(part, ids) for cut, part in before.items()}
            at |= {0: 0, len(draft.text): len(ids)}
            spans = [(at[start], at[end]) for start, end in draft.spans]
            start = draft.spans[0][0]
            if start and at[start] < len(before[start]):
                notes.append("the first learned token holds the end of the prompt")
        if not ids:
            raise BadRecord("no token to learn")
        closed = draft.ids is not None and not draft.chat
        if draft.chat and self.rendering.loss_on == "all":
            closed = ids[-1] in self.special or self.closed(ids, 0, len(ids))[1]
        elif draft.chat:
            ends = [self.closed(ids, *span) for span in spans]
            spans = [(start, end) for (start, _), (end, _) in zip(spans, ends, strict=True)]
            # Text after the last learned turn is another turn: no place for an EOS.
            closed = ends[-1][1] or spans[-1][1] < len(ids)
        elif not closed:
            if self.prefix and ids[: len(self.prefix)] != self.prefix:
                ids = self.prefix + ids
                spans = [(a + len(self.prefix), b + len(self.prefix)) for a, b in spans]
            closed = ids[-1] == self.eos
        if not closed:
            if self.eos is None:
                raise ValueError("The tokenizer has no end-of-sequence token; set its eos_token.")
            ids = [*ids, self.eos]
            spans = [*spans[:-1], (spans[-1][0], len(ids))]
        if self.bos is not None and draft.text and ids[:2] == [self.bos, self.bos]:
            ids, spans = ids[1:], [(max(a - 1, 0), b - 1) for a, b in spans]

        labels = [IGNORE] * len(ids)
        for start, end in spans:
            labels[start:end] = ids[start:end]
        return self.limit(draft.origin, ids, labels, notes)

    def with_ends(
        self, ids: list[int], runs: list[tuple[int, int]], open_end: bool
    ) -> list[tuple[int, int]]:
        """Marked turns, extended by the end-of-turn token where the marks stop before it."""
        marks = {self.eos}
        if open_end and runs[-1][1] < len(ids):
            marks.add(ids[runs[-1][1]])
        return [
            (start, end + 1)
            if end < len(ids) and ids[end] in marks & self.special and ids[end - 1] not in marks
            else (start, end)
            for start, end in runs
        ]

    def closed(self, ids: list[int], start: int, end: int) -> tuple[int, bool]:
        """The end of a turn just after its end-of-turn token, and whether there is one."""
        mark = next((i for i in reversed(range(start, end)) if ids[i] in self.special), None)
        if mark is None or str(self.tokenizer.decode(ids[mark + 1 : end])).strip():
            return end, False
        return mark + 1, True

    def limit(
        self, origin: str, ids: list[int], labels: list[int], notes: list[str]
    ) -> Encoded | Rejected:
        if self.vocab_size is not None and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            worst = min(ids) if min(ids) < 0 else max(ids)
            raise BadRecord(
                f"token id outside the vocabulary: {worst}, not in 0..{self.vocab_size - 1}"
            )
        most, how = self.rendering.max_length, self.rendering.truncation
        if most is not None and len(ids) > most:
            first = next((i for i, label in enumerate(labels) if i and label != IGNORE), len(ids))
            reason = f"longer than max_length {most}"
            if first >= most:
                reason = f"prompt longer than max_length {most}"
            if how == "error":
                raise ValueError(
                    f"{origin} has {len(ids)} tokens, above max_length {most}; raise max_length or "
                    "set truncation to drop, keep_start or keep_end."
                )
            if how == "drop" or (how == "keep_start" and first >= most):
                raise BadRecord(f"{reason}: {len(ids)} tokens")
            if how == "keep_start":
                ids, labels = ids[:most], labels[:most]
            else:
                keep = self.prefix if ids[: len(self.prefix)] == self.prefix else []
                keep = keep[: most - 1]
                cut = len(ids) - (most - len(keep))
                ids, labels = keep + ids[cut:], [IGNORE] * len(keep) + labels[cut:]
            notes.append(f"cut to max_length {most} ({how})")
        labels = [IGNORE, *labels[1:]]
        if all(label == IGNORE for label in labels):
            raise BadRecord("no token to learn")
        return Encoded(ids, labels, tuple(notes))


def _shared(part: list[int], whole: list[int]) -> int:
    """Length of the common start of two token lists."""
    if whole[: len(part)] == part:
        return len(part)
    return next(i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b)


def _runs(mask: Iterable[Any]) -> list[tuple[int, int]]:
    """The (start, end) of each run of true values."""
    runs: list[tuple[int, int]] = []
    start = None
    for i, value in enumerate([*mask, False]):
        if value and start is None:
            start = i
        elif not value and start is not None:
            runs.append((start, i))
            start = None
    return runs
