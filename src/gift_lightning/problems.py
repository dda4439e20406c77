"""Where prompts with a verifiable answer come from: files, reasoning-gym tasks, Countdown."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from gift_lightning import countdown
from gift_lightning.readers import Source, first_line, rows
from gift_lightning.seeds import keyed_seed

if TYPE_CHECKING:  # worker processes of user rewards may import this module: no torch
    from transformers import PreTrainedTokenizerBase

Prompt: TypeAlias = str | list[dict[str, Any]]
"""Text, or chat messages."""

# What a reward is called with besides the columns, one completion at a time or many.
_ALWAYS = {"prompt", "completion", "completion_ids", "max_completion_length"}
RESERVED = _ALWAYS | {"prompts", "completions"}


@dataclass(frozen=True)
class Problem:
    """A prompt and what rewards read to judge its completions."""

    prompt: Prompt
    columns: dict[str, Any]
    """JSON values by name: answer, numbers, target, ..."""
    origin: str = ""
    """`file:line`, or any name to report the problem by."""


class Problems(ABC):
    """A set of problems, named in a config."""

    @abstractmethod
    def load(self) -> list[Problem]:
        """The problems, the same at every call.

        Raises:
            ValueError: they cannot be had, or there are none.
        """


class JSONLProblems(Problems):
    """Problems of a file, one row each, or of any other source that SFTData reads.

    Args:
        path: a .jsonl, .json, .csv or .parquet file, a folder of datasets.save_to_disk, or a hub id
            (owner/name, or owner/name:config).
        prompt: its column with the prompt: text, or chat messages.
        columns: the file's column for each column that a reward reads, where the names differ:
            {answer: solution}. Every other column keeps its name; one that is named as an argument
            of rewards is (completion, prompts, ...) or that JSON cannot hold is left out.
        prompt_format: text around a text prompt, for example "Question: {prompt} Answer:".
        limit: read only this many rows from the start.
        split: of a hub dataset, or of a saved folder that holds several.
    """

    def __init__(
        self,
        path: str,
        prompt: str = "prompt",
        columns: dict[str, str] | None = None,
        prompt_format: str = "{prompt}",
        limit: int | None = None,
        split: str = "train",
    ) -> None:
        self.source = Source(path, split, limit=limit)
        self.prompt, self.columns = prompt, dict(columns or {})
        self.prompt_format = _checked_format(prompt_format)
        if taken := sorted(RESERVED & self.columns.keys()):
            raise ValueError(
                f"{path}: columns cannot be named {taken[0]!r}, which rewards are called with: "
                "choose another name."
            )

    def load(self) -> list[Problem]:
        found = [
            self._problem(origin, row)
            for origin, row in islice(rows(self.source), self.source.limit)
        ]
        if not found:
            raise ValueError(f"{self.source.path} holds no problems: give a file with rows.")
        return found

    def _problem(self, origin: str, row: dict[str, Any] | str) -> Problem:
        if isinstance(row, str):
            raise ValueError(f"{origin} cannot be read: {row}.")
        for wanted in (self.prompt, *self.columns.values()):
            if wanted not in row:
                raise ValueError(
                    f"{origin} has no column {wanted!r}, only {', '.join(map(repr, row))}: name "
                    "the right one in `prompt` or `columns`."
                )
        prompt = row[self.prompt]
        if isinstance(prompt, str):
            good = bool(prompt.strip())
            prompt = self.prompt_format.replace("{prompt}", prompt)
        else:
            good = isinstance(prompt, list) and bool(prompt) and all(map(_is_message, prompt))
        if not good:
            raise ValueError(
                f"{origin}: column {self.prompt!r} must hold a text or chat messages with role "
                f"and content, not {_shown(prompt)}."
            )
        moved = {self.prompt, *self.columns.values()}
        kept = {name: row[name] for name in row if name not in moved and name not in RESERVED}
        mapped = {name: row[of] for name, of in self.columns.items()}
        columns = {name: x for name, x in {**kept, **mapped}.items() if _is_json(x)}
        return Problem(prompt, columns, origin)


class ReasoningGymProblems(Problems):
    """Problems that a reasoning-gym task makes; needs ``pip install reasoning-gym``.

    Columns: `answer`, the task's own (null where it has none), and `entry`, what its scorer reads.

    Args:
        task: for example chain_sum. puzzle24 is refused: its scorer does not look at which numbers
            an answer uses, so one constant answer solves every problem.
        size: how many.
        seed: another draws anew, and a small task repeats itself. The task makes problem i from its
            seed plus i, so that its 0 and 1 differ in one problem: it gets a number made from this.
        config: its other options, for example {max_terms: 2}.
        prompt_format: text around the question.
    """

    def __init__(
        self,
        task: str,
        size: int = 256,
        seed: int = 0,
        config: dict[str, Any] | None = None,
        prompt_format: str = "{prompt}",
    ) -> None:
        if task == "puzzle24":
            raise ValueError("reasoning-gym's puzzle24 scores any numbers: use countdown instead.")
        if size < 1:
            raise ValueError(f"ReasoningGymProblems.size must be at least 1, got {size}: raise it.")
        self.task, self.size, self.seed, self.config = task, size, seed, dict(config or {})
        self.prompt_format = _checked_format(prompt_format)

    def load(self) -> list[Problem]:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError(
                f"the problems of {self.task!r} need a package: pip install reasoning-gym."
            ) from error
        seed = keyed_seed(self.seed, "reasoning-gym", self.task) >> 32  # numpy takes 32 bits
        try:
            data = reasoning_gym.create_dataset(self.task, size=self.size, seed=seed, **self.config)
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"reasoning-gym cannot make {self.task!r} with {self.config}: {first_line(error)}."
            ) from error
        found = []
        for i, entry in enumerate(data):
            origin = f"reasoning-gym {self.task} {i}"
            if not _is_json(entry):
                raise ValueError(
                    f"{origin}: the task's entry cannot be kept as JSON: choose another task."
                )
            bare = json.loads(json.dumps(entry))  # as a reward gets it: tuples are lists
            prompt = self.prompt_format.replace("{prompt}", entry["question"])
            found.append(Problem(prompt, {"answer": bare["answer"], "entry": bare}, origin))
        return found


class CountdownProblems(Problems):
    """Countdown in the prompt format of the embedded base; columns `numbers` and `target`.

    Args:
        split: train, demonstration, validation or test; no two share a problem.
        kind: in (solvable with + and -), out (only with a *), any, or drawn (as often as random
            expressions have their value).
        size: how many.
        seed: which of them, and the order of their numbers.
    """

    def __init__(
        self,
        split: countdown.Split = "train",
        kind: countdown.Kind = "any",
        size: int = 256,
        seed: int = 0,
    ) -> None:
        if size < 1:
            raise ValueError(f"CountdownProblems.size must be at least 1, got {size}: raise it.")
        self.split, self.kind, self.size, self.seed = split, kind, size, seed

    def load(self) -> list[Problem]:
        made = countdown.problems(self.split, self.size, self.seed, self.kind)
        return [
            Problem(
                p.prompt,
                {"numbers": list(p.numbers), "target": p.target},
                f"countdown {self.split} {self.kind} {i}",
            )
            for i, p in enumerate(made)
        ]


class ConcatProblems(Problems):
    """Several sets as one.

    Args:
        parts: the sets, in order.
    """

    def __init__(self, parts: list[Problems]) -> None:
        if not parts:
            raise ValueError("ConcatProblems.parts is empty: name at least one set of problems.")
        self.parts = parts

    def load(self) -> list[Problem]:
        return [problem for part in self.parts for problem in part.load()]


def check_columns(name: str, problems: Iterable[Problem], needed: Iterable[str]) -> None:
    """Raises ValueError if a problem lacks a column that the reward `name` needs."""
    wanted = sorted(set(needed) - RESERVED)
    for problem in problems:
        missing = [x for x in wanted if x not in problem.columns]
        if missing:
            raise ValueError(
                f"{problem.origin} has no column {missing[0]!r}, which the reward {name} reads: "
                f"map it by `columns: {{{missing[0]}: NAME_IN_THE_FILE}}`, or use another reward."
            )


def prompt_tokens(
    tokenizer: "PreTrainedTokenizerBase", problem: Problem, chat: bool = False
) -> list[int]:
    """The tokens after which a completion begins.

    Messages, and a text under `chat` as one user turn, go through the tokenizer's chat template
    with its generation prompt; any other text gets the tokenizer's usual prefix and no end token.

    Raises:
        ValueError: there is no chat template where one is needed, it raises, or nothing is left.
    """
    prompt = problem.prompt
    if isinstance(prompt, str) and not chat:
        ids = list(tokenizer(prompt)["input_ids"])
        if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            ids.pop()
    else:
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{problem.origin}: a chat prompt needs a chat template, which the tokenizer does "
                "not have: set chat to false and use text prompts, or use another tokenizer."
            )
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is code of others, and raises what it likes
            raise ValueError(
                f"{problem.origin}: the chat template raised: {first_line(error)}."
            ) from error
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise ValueError(f"{problem.origin}: the prompt has no token: drop it or change it.")
    return ids


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one text: messages as JSON."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _checked_format(prompt_format: str) -> str:
    if "{prompt}" not in prompt_format:
        raise ValueError(f"prompt_format {prompt_format!r} must contain {{prompt}}.")
    return prompt_format


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
