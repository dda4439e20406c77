"""Which tokens of a chat are learned: its assistant turns, each with the mark of its end."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedTokenizerBase

from gift_lightning.readers import first_line
from gift_lightning.records import BadRecord, Messages, Record

LossOn: TypeAlias = Literal["assistant", "last", "all"]
Span: TypeAlias = tuple[int, int]

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")


@dataclass
class Draft:
    """A record whose characters, or tokens, to learn are known."""

    spans: list[Span]
    """Characters of `text` to learn, or positions in `ids` if there are any."""
    text: str = ""
    ids: list[int] | None = None
    chat: bool = False
    notes: tuple[str, ...] = ()

    @property
    def cuts(self) -> list[int]:
        """Where inside the text a span starts or ends."""
        return sorted({cut for span in self.spans for cut in span} - {0, len(self.text)})


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All special tokens; some tokenizers list the end of a turn only among those added."""
    added = tokenizer.added_tokens_decoder.items()
    return set(tokenizer.all_special_ids) | {i for i, token in added if token.special}


class Chats:
    """Finds the assistant turns in what a tokenizer's chat template renders.

    `check` raises BadRecord for a text that must not be tokenised.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, check: Callable[[str], None]
    ) -> None:
        self.tokenizer, self.loss_on, self.check = tokenizer, loss_on, check
        self.special = special_ids(tokenizer)

    def draft(self, record: Record, context: Messages, completion: Messages) -> Draft:
        """The rendered chat, of which turns of `completion` are learned."""
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{record.origin} is a chat, but the tokenizer has no chat template; "
                "use a chat model's tokenizer or plain prompt and completion columns."
            )
        messages = [*context, *completion]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        learned = [i for i in turns if i >= len(context)]
        if not learned:
            raise BadRecord("no assistant turn to learn")
        for i in learned:
            if not messages[i].get("tool_calls") and not messages[i]["content"].strip():
                raise BadRecord("blank completion")
        if self.loss_on == "last":
            learned = learned[-1:]

        text = self._template(record, messages)
        self.check(text)
        if self.loss_on == "all":
            return Draft([(0, len(text))], text, chat=True)
        if GENERATION.search(str(self.tokenizer.get_chat_template(tools=record.tools))):
            marks = {"return_dict": True, "return_assistant_tokens_mask": True}
            out = self._template(record, messages, tokenize=True, **marks)
            ids, marked = list(out["input_ids"]), runs(out["assistant_masks"])
            if len(marked) == len(turns):
                marked = self._with_ends(ids, marked, open_end=turns[-1] == len(messages) - 1)
                return Draft([marked[turns.index(i)] for i in learned], ids=ids, chat=True)

        spans: list[Span] = []
        for i in reversed(learned):
            span = self._turn(record, messages, i, text)
            if span is None:
                break
            spans.insert(0, span)
        if not spans:
            raise BadRecord("the chat template hides where the last assistant turn starts")
        if len(spans) == len(learned):
            return Draft(spans, text, chat=True)
        note = "only the last assistant turn is learned (the template rewrites others)"
        return Draft(spans[-1:], text, chat=True, notes=(note,))

    def _turn(self, record: Record, messages: Messages, i: int, text: str) -> Span | None:
        """The characters of one assistant turn, if rendering is incremental there."""
        if i == 0:
            raise BadRecord("the conversation starts with an assistant turn")
        before = self._template(record, messages[:i], add_generation_prompt=True)
        last = i == len(messages) - 1
        after = text if last else self._template(record, messages[: i + 1])
        if not (text.startswith(after) and after.startswith(before) and len(after) > len(before)):
            return None
        # An empty thinking block is the template's way to say "no thinking", not an answer.
        thinking = EMPTY_THINKING.match(text, len(before))
        return (thinking.end() if thinking else len(before)), len(after)

    def _template(
        self, record: Record, messages: Messages, tokenize: bool = False, **options: Any
    ) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=record.tools, tokenize=tokenize, **options
            )
        except Exception as error:  # a template is code of others, and raises what it likes
            raise BadRecord(f"the chat template raised: {first_line(error)}") from error

    def _with_ends(self, ids: list[int], marked: list[Span], open_end: bool) -> list[Span]:
        """Marked turns, extended by the end-of-turn token where the marks stop before it."""
        ends = {self.tokenizer.eos_token_id}
        if open_end and marked[-1][1] < len(ids):
            ends.add(ids[marked[-1][1]])
        stops = ends & self.special
        return [
            (a, b + 1) if b < len(ids) and ids[b] in stops and ids[b - 1] not in ends else (a, b)
            for a, b in marked
        ]

    def end(self, ids: list[int], start: int, end: int) -> int | None:
        """Where a turn ends with its end-of-turn token, just after it; None if it has none."""
        mark = next((i for i in reversed(range(start, end)) if ids[i] in self.special), None)
        if mark is None or str(self.tokenizer.decode(ids[mark + 1 : end])).strip():
            return None
        return mark + 1


def runs(mask: Iterable[object]) -> list[Span]:
    """The (start, end) of each run of true values."""
    return [run.span() for run in re.finditer(b"\x01+", bytes(map(bool, mask)))]
