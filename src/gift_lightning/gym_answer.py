"""Rewards of reasoning-gym's tasks, without the loopholes of their scorers."""

import re
from collections.abc import Callable
from typing import Any

from gift_lightning.rewards import Reward


class ReasoningGym(Reward):
    """The scorer of a reasoning-gym task, read strictly: 1 for a right answer, 0 otherwise.

    The answer is what stands in the last ``<answer>`` tag, or else the whole completion, stripped.
    Strict is more than a bound on the scorer's credit, which is generous: an answer other than the
    reference's own text must get 0.99 of it, a number must be near the number it stands for (one
    scorer takes the first number of a list, another any sign), digits must be ASCII, and what a
    scorer would hand to `eval` or sympy must be plain arithmetic. `strict=False` keeps the last
    rule alone and returns the credit, floors such as 0.01 for garbage included.
    """

    reads = ("entry",)

    def __init__(self, task: str, strict: bool = True) -> None:
        """
        Args:
            task: of reasoning-gym.
            strict: see above.

        Raises:
            ValueError: a task whose scorer is broken.
        """
        if why := _BROKEN.get(task):
            raise ValueError(f"ReasoningGym.task: {task} cannot be used, because {why}.")
        self.task, self.strict = task, strict
        self._scorer: Callable[[str, dict], float] | None = None

    def prepare(self) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.dataset import ProceduralDataset
            from reasoning_gym.factory import DATASETS
        except ImportError as error:
            raise ValueError(
                f"ReasoningGym needs reasoning-gym ({error}): pip install 'gift-lightning[gym]'."
            ) from None
        if self.task not in DATASETS:
            raise ValueError(
                f"ReasoningGym.task: reasoning-gym has no task {self.task!r}: rename it."
            )
        self._scorer = reasoning_gym.get_score_answer_fn(self.task)
        # Substring credit and nothing else: only the reference itself is right.
        base = DATASETS[self.task][0].score_answer is ProceduralDataset.score_answer
        self._one_answer = base or self.task in _ONE_ANSWER

    def answer(self, completion: str, **columns: Any) -> str | None:
        end = completion.rfind("</answer>")
        start = completion.rfind("<answer>", 0, max(0, end))
        tagged = start >= 0
        return (completion[start + len("<answer>") : end] if tagged else completion).strip() or None

    def score(self, completion: str, **columns: Any) -> float | None:
        if self._scorer is None:
            self.prepare()
        assert self._scorer is not None
        entry = columns["entry"]
        if not isinstance(entry, dict) or not {"answer", "metadata"} <= entry.keys():
            return None
        if entry["metadata"].get("source_dataset", self.task) != self.task:
            return None
        answer = self.answer(completion)
        gold = None if entry["answer"] is None else str(entry["answer"]).strip()
        if not answer:
            return 0.0
        if self.strict and answer == gold:
            return 1.0
        if self.strict and (self._one_answer or not _near(answer, gold)):
            return 0.0
        if (form := _EVALUATED.get(self.task)) and not form.fullmatch(answer):
            return 0.0
        try:
            credit = float(self._scorer(answer, entry))
        except Exception:  # some scorers cannot read just anything
            return 0.0 if gold is None or self._reads_gold(gold, entry) else None
        if not self.strict:
            return credit
        return float(credit >= 0.99)

    def _reads_gold(self, gold: str, entry: dict) -> bool:
        """Whether it was the answer, and not the entry, that the scorer could not read."""
        assert self._scorer is not None
        try:
            self._scorer(gold, entry)
        except Exception:
            return False
        return True


_BROKEN = {
    "puzzle24": "its scorer never checks which numbers are used (one constant answer is always "
    "right): use countdown",
    "game_of_life_halting": "its scorer takes any text for True: use game_of_life",
    "composite": "it has no scorer of its own: name the tasks that it is composed of",
}
# Scorers that credit what is only like the answer; arc_agi's and rearc's want tuples, not JSON.
_ONE_ANSWER = ("arc_agi", "rearc", "spell_backward", "string_insertion", "time_intervals")
_ARITHMETIC = re.compile(r"(?!.*(?:\*\*|//))[0-9+\-*/() ]+")
_LIST = re.compile(r"[0-9A-Za-z_\s,'\"\[\]-]+")
_FORMULA = re.compile(
    r"(?:[0-9+\-*/^(), ]|\.[0-9]|\b(?:[A-DF-MPRT-Zabcdf-z]|E|e|pi|exp|log|ln|sqrt|abs|Abs|"
    r"a?(?:sin|cos|tan)h?)\b)+",
    re.ASCII,
)
# What these scorers evaluate as code or by sympy.
_EVALUATED = {
    "countdown": _ARITHMETIC,
    "simple_integration": _FORMULA,
    "intermediate_integration": _FORMULA,
    "polynomial_multiplication": _FORMULA,
    "string_insertion": _LIST,
    "spiral_matrix": _LIST,
    "binary_matrix": _LIST,
    "n_queens": _LIST,
}


def _near(answer: str, gold: str | None) -> bool:
    """Whether the answer may stand for the reference: for a number a number within a percent."""
    if any(c.isdigit() and not c.isascii() and c not in (gold or "") for c in answer):
        return False
    try:
        reference = float(gold or "")
    except ValueError:
        # Not even next to a number: a complex NaN is at no distance from anything.
        return re.search(r"(?i)\b(?:nan|inf(?:inity)?)", answer) is None
    try:
        said = float(answer.replace(",", ""))
    except ValueError:
        return False
    return abs(said - reference) <= abs(reference) / 100
