"""What a completion is worth: the interface of rewards, the small ones, how a config names them.

Rewards run in the worker processes of `workers.RewardPool`, so nothing here imports torch.
"""

import asyncio
import inspect
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, cast

from gift_lightning import countdown


class Reward(ABC):
    """Scores one completion; runs in a worker process, one call at a time.

    Attributes:
        minimum: what a completion scores that fails by its own fault: it ran into the deadline,
            crashed the worker, or made the reward raise. No honest answer may score less.
        reads: columns of the problem without which nothing can be scored.

    A reward may also have ``answer(completion, **columns) -> str | None``: the answer it reads, by
    which evaluations count votes. It runs outside the workers, so it only looks for text.
    """

    minimum: float = 0.0
    reads: tuple[str, ...] = ()

    def prepare(self) -> None:  # noqa: B027 - most rewards need nothing
        """Imports what scoring needs; called once, before the workers are forked.

        Raises:
            ValueError or ImportError: the reward cannot run here.
        """

    def check(self, max_completion_length: int) -> None:  # noqa: B027
        """Whether it can score completions of up to so many tokens; called before training.

        Raises:
            ValueError: it cannot.
        """

    @abstractmethod
    def score(self, completion: str, **columns: Any) -> float | None:
        """The score, or None if the *problem* cannot be scored, such as by an unusable reference.

        Args:
            completion: without special tokens and without the end token.
            columns: of the problem; besides, `prompt` (text or messages), `completion_ids` and
                `max_completion_length` (tokens).
        """


@dataclass(frozen=True)
class WeightedReward:
    """A reward of a run; `spec` (class_path, init_args) is what a worker rebuilds it from."""

    name: str
    reward: Reward
    weight: float = 1.0
    spec: dict[str, Any] = field(default_factory=dict)


class Countdown(Reward):
    """1 for an expression with the value `target` that uses each of `numbers` once, 0 otherwise.

    The whole completion must be the answer; it is parsed by `countdown.verify`, never evaluated.
    """

    reads = ("numbers", "target")

    def score(self, completion: str, **columns: Any) -> float | None:
        numbers, target = columns["numbers"], columns["target"]
        if not isinstance(numbers, list) or not numbers or type(target) is not int:
            return None
        if any(type(number) is not int for number in numbers):
            return None
        return float(countdown.verify(completion, numbers, target))


class Format(Reward):
    """1 if `regex` matches the whole completion (a dot matches a line break too), 0 otherwise."""

    def __init__(self, regex: str) -> None:
        """
        Raises:
            ValueError: `regex` does not compile.
        """
        try:
            self.regex = re.compile(regex, re.DOTALL)
        except re.error as error:
            raise ValueError(
                f"Format.regex: {regex!r} is no regular expression ({error}): mend it."
            ) from None

    def score(self, completion: str, **columns: Any) -> float | None:
        return float(self.regex.fullmatch(completion) is not None)


class LengthPenalty(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), from 0 down to -1.

    0 for up to `max_length - cache` tokens, then linear down to -1 at `max_length` and beyond.
    """

    minimum = -1.0

    def __init__(self, cache: int, max_length: int | None = None) -> None:
        """
        Args:
            cache: tokens before `max_length` in which the penalty grows.
            max_length: tokens; None is the run's max_completion_length.

        Raises:
            ValueError: cache is not between 1 and max_length, here or in `check`.
        """
        self.cache, self.max_length = cache, max_length
        self._check("max_length" if max_length is None else max_length)

    def check(self, max_completion_length: int) -> None:
        if self.max_length is None:
            self._check(max_completion_length)

    def _check(self, most: int | str) -> None:
        if self.cache < 1 or (isinstance(most, int) and self.cache > most):
            raise ValueError(
                f"LengthPenalty.cache must lie between 1 and {most}, got {self.cache}: change it."
            )

    def score(self, completion: str, **columns: Any) -> float | None:
        limit = self.max_length
        if limit is None:
            limit = columns["max_completion_length"]
        over = len(columns["completion_ids"]) - (limit - self.cache)
        return -min(1.0, max(0, over) / self.cache)


class ExactMatch(Reward):
    """1 if the completion is the reference, white space around both apart, 0 otherwise."""

    def __init__(self, answer: str = "answer", ignore_case: bool = False) -> None:
        """
        Args:
            answer: column of the reference: text, or a number as it is printed (27.0 as 27).
            ignore_case: compare without case.
        """
        self.column, self.ignore_case = answer, ignore_case
        self.reads = (answer,)

    def answer(self, completion: str, **columns: Any) -> str | None:
        return completion.strip() or None

    def score(self, completion: str, **columns: Any) -> float | None:
        gold = printed(columns[self.column])
        if not gold:
            return None
        said = completion.strip()
        if self.ignore_case:
            gold, said = gold.casefold(), said.casefold()
        return float(said == gold)


def printed(gold: Any) -> str | None:
    """A reference as text, stripped; None if it is neither text nor a finite number."""
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)  # data files turn whole columns into floats
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        return None
    return None if isinstance(gold, float) and not math.isfinite(gold) else str(gold).strip()


class FunctionReward(Reward):
    """A function with TRL's signature, called with lists of one.

    ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``: every column of
    the problem is a list, and a completion is a list of messages where the prompt is one. It is
    given what its signature names. An attribute `minimum` of the function is the reward's.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.minimum = getattr(function, "minimum", 0.0)
        kinds = inspect.signature(function).parameters.values()
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in kinds)
        self._names = {p.name for p in kinds if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.reads = tuple(
            p.name
            for p in kinds
            if p.name in self._names
            and p.default is p.empty
            and p.name not in ("prompts", "completions", "completion_ids", "max_completion_length")
        )
        if not self._takes_any and "completions" not in self._names:
            raise ValueError(
                "the function takes no completions: give it TRL's signature, "
                "f(prompts, completions, completion_ids, **columns)."
            )

    def score(self, completion: str, **columns: Any) -> Any:
        prompt = columns.pop("prompt", "")
        said = (
            completion
            if isinstance(prompt, str)
            else [{"role": "assistant", "content": completion}]
        )
        given = {
            **{name: [value] for name, value in columns.items()},
            "prompts": [prompt],
            "completions": [said],
        }
        if not self._takes_any:
            given = {name: value for name, value in given.items() if name in self._names}
        scores = self.function(**given)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_result(scores))
        whole = isinstance(scores, str) or not hasattr(scores, "__len__") or len(scores) != 1
        return scores if whole else scores[0]  # anything but a list of one is refused as no number


async def _result(scores: Any) -> Any:
    return await scores


# How a config names rewards

_BUILT_IN = {
    "Countdown": "gift_lightning.rewards.Countdown",
    "ExactMatch": "gift_lightning.rewards.ExactMatch",
    "Format": "gift_lightning.rewards.Format",
    "LengthPenalty": "gift_lightning.rewards.LengthPenalty",
    "MathAnswer": "gift_lightning.math_answer.MathAnswer",
    "ReasoningGym": "gift_lightning.gym_answer.ReasoningGym",
}


def build_rewards(specs: Sequence[str | dict[str, Any]]) -> list[WeightedReward]:
    """The rewards of a run, each with a name of its own.

    Args:
        specs: for each reward its name or dotted path, or {class_path, init_args, weight}. The path
            is of a Reward or of a function with TRL's signature.

    Raises:
        ValueError: one sentence on a path that does not import or is neither, on init_args that it
            does not take, and on a weight that is negative or no number.
    """
    if isinstance(specs, str):
        raise ValueError("rewards is a list: write `rewards: [{class_path: ..., weight: 1}]`.")
    built: list[WeightedReward] = []
    for i, spec in enumerate(specs):
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        key = f"rewards[{i}]"
        if unknown := sorted(set(spec) - {"class_path", "init_args", "weight"}):
            raise ValueError(
                f"{key}: {unknown[0]!r} is no key of a reward: use class_path, init_args, weight."
            )
        path = spec.get("class_path")
        if not isinstance(path, str) or not path:
            raise ValueError(f"{key}.class_path must name a reward or a function, not {path!r}.")
        weight = spec.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise ValueError(
                f"{key}.weight must be a finite number of 0 or more, got {weight!r}: change it; a "
                "penalty returns negative scores, as a negative weight would reward a crash."
            )
        key = f"{key} ({path})"
        path = _BUILT_IN.get(path, path)
        target = _named(path, key)
        whole = {"class_path": path, "init_args": _checked(target, spec.get("init_args"), key)}
        try:
            reward = rebuild(whole)
            _check_interface(reward)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{key}: {error}") from None
        name, taken = path.rpartition(".")[2], {other.name for other in built}
        names = [name, *(f"{name}_{n}" for n in range(2, len(specs) + 2))]
        name = next(n for n in names if n not in taken)
        built.append(WeightedReward(name, reward, float(weight), whole))
    return built


def rebuild(spec: dict[str, Any]) -> Reward:
    """The reward of a `WeightedReward.spec`."""
    target = _imported(spec["class_path"])
    if inspect.isclass(target):
        return cast(Reward, target(**spec["init_args"]))
    return FunctionReward(target)


def _imported(path: str) -> Any:
    """What a dotted path names; it may lie inside a class."""
    names: list[str] = []
    module = path
    while True:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
        try:
            found: Any = import_module(module)
            break
        except ModuleNotFoundError as error:
            # Only a part of the path itself: a module may lack one that it imports.
            if "." not in module or not f"{module}.".startswith(f"{error.name}."):
                raise
    for name in names:
        found = getattr(found, name)
    return found


def _named(path: str, key: str) -> Any:
    if "." not in path:
        known = ", ".join(sorted(_BUILT_IN))
        raise ValueError(f"{key} names no reward: choose {known}, or the dotted path of your own.")
    if path.startswith("__main__."):
        raise ValueError(f"{key}: workers cannot import a script or notebook: move it to a file.")
    try:
        target = _imported(path)
    except Exception as error:  # whatever the user's module raises
        said = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key} does not import ({said}): correct the path or the file.") from None
    if not (issubclass(target, Reward) if inspect.isclass(target) else callable(target)):
        raise ValueError(f"{key} is neither a Reward nor a function: name one of them.")
    return target


def _checked(target: Any, args: Any, key: str) -> dict[str, Any]:
    """The arguments, with defaults and converted to what the signature says."""
    args = {} if args is None else args
    if not isinstance(args, dict):
        raise ValueError(f"{key}.init_args must be a mapping, not {args!r}.")
    if not inspect.isclass(target):
        if args:
            raise ValueError(
                f"{key} is a function and takes no init_args: drop them, or use a class."
            )
        return {}
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(target, None, fail_untyped=False)
    try:
        checked = parser.parse_object(args).as_dict()
        json.dumps(checked)  # how it travels to the workers
    except Exception as error:  # argparse's own, and whatever a user's types raise
        raise ValueError(f"{key}.init_args: {_complaint(str(error))}") from None
    return checked


def _complaint(message: str) -> str:
    """One sentence of jsonargparse's several lines."""
    key = re.search(r'Parser key "([^"]+)"', message)
    wrong = re.search(r"Expected an? (?:<class '([^']+)'>|(.+?))\. Got value: (.*)", message)
    if wrong:
        name = f"{key[1]} " if key else ""
        return f"{name}must be {wrong[1] or wrong[2]}, not {wrong[3]!r}."
    return " ".join(message.split()).rstrip(".") + "."


def _check_interface(reward: Reward) -> None:
    parameters = inspect.signature(reward.score).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError("its score must take **columns: add them to the signature.")
    minimum = reward.minimum
    if isinstance(minimum, bool) or not isinstance(minimum, int | float):
        raise ValueError(f"its minimum must be a number, got {minimum!r}.")
    if not math.isfinite(minimum):
        raise ValueError(f"its minimum must be finite, got {minimum}: a failed answer scores it.")
    if "completion" in reward.reads:
        raise ValueError(
            "it cannot read the column 'completion', which is the model's: rename the file's, "
            "e.g. columns: {answer: completion}."
        )


def needs(reward: Reward) -> set[str]:
    """Columns without which a call cannot be made."""
    parameters = list(inspect.signature(reward.score).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for p in parameters if p.kind in kinds and p.default is p.empty}
    return named | set(reward.reads)
