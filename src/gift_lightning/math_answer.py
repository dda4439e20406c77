r"""Answers to mathematical problems: found by their anchor, compared as numbers first.

Text is only matched and counted here; what is neither a number nor a word goes to math-verify (and
with it to sympy), which may never end: score it through `workers.RewardPool`.
"""

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from gift_lightning.answers import WRAPPED, Answer, Number, bare, final_answer, read
from gift_lightning.rewards import Reward, printed

_MAX_LENGTH = 256  # characters of an answer; nothing longer is compared
_MAX_DEPTH = 10  # nested brackets: parsing time grows steeply with them


class MathAnswer(Reward):
    r"""1 if the answer equals the reference, 0 otherwise.

    The completion's answer is its last ``\boxed{}``, or else its last ``####`` line; text without
    such an anchor has no answer. Numbers are compared exactly (``1,234.50``, ``\frac{3}{4}``,
    ``2 \times 10^{3}``; a decimal stands for a fraction that it equals to six digits). A percent
    sign is a factor, or a unit where the reference is above 1; a unit that only one side names is
    ignored. Words must be the same; everything else is up to math-verify. Against a number only
    closed forms such as ``2^{10}`` are tried, so that a sum left open is no answer.

    None for a reference that is neither a number, nor a word, nor read by math-verify.
    """

    def __init__(self, answer: str = "answer") -> None:
        r"""
        Args:
            answer: column of the reference: a number or text, of which the last ``\boxed{}`` or
                ``####`` line counts, or all if there is none.
        """
        self.column = answer
        self.reads = (answer,)

    def prepare(self) -> None:
        try:
            import math_verify  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"MathAnswer needs math-verify ({error}): pip install 'gift-lightning[math]'."
            ) from None
        # It says at every call that the deadline is kept by somebody else.
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        for text in r"\frac{x}{2}+\sqrt{3}", "(1,2]", r"x^2 \le 1":  # builds its parser's tables
            _verify(_parsed(text), _parsed(text))

    def answer(self, completion: str, **columns: Any) -> str | None:
        return final_answer(completion)

    def score(self, completion: str, **columns: Any) -> float | None:
        text = printed(columns[self.column])
        gold = _reference(text) if text else None
        if gold is None:
            return None
        said = final_answer(completion)
        if said is None or not said or len(said) > _MAX_LENGTH:
            return 0.0
        return float(_equal(gold, read(said)))


@lru_cache(maxsize=4096)
def _reference(text: str) -> Answer | None:
    """The reference as it is compared; None if it cannot be."""
    anchored = final_answer(text)
    found = text if anchored is None else anchored
    if not found or len(found) > _MAX_LENGTH:
        return None
    gold = read(found)
    prose = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,} [A-Za-z]{2,}", WRAPPED.sub("", gold.text))
    if anchored is None and (prose or "\n" in found):
        return None
    if gold.number is not None or _words(gold.text):
        return gold
    # Numbers side by side would be added up.
    return gold if _parsed(gold.text) and not re.search(r"\d\s+\d", gold.text) else None


# Comparing


_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*|[A-Z]")
# A power, a root or a binomial of literals; products only of them.
_CLOSED = re.compile(
    r"(?=.*(?:\^|\\sqrt|\\binom|!))"
    r"(?:\d+(?:\.\d+)?(?!\s+\d)|(?:^|(?<=[{(^]))\s*-|[\s{}()\[\]^!/*]|"
    r"\\(?:frac|sqrt|binom|cdot|times))+",
    re.ASCII,
)


def _equal(gold: Answer, said: Answer) -> bool:
    if gold.name and said.name and gold.name != said.name:
        return False
    if gold.number is not None and said.number is not None:
        return _same(gold.number, said.number)
    a, b = _words(gold.text), _words(said.text)
    if a or b:
        return a == b
    if not said.text.isascii() or _depth(said.text) > _MAX_DEPTH:
        return said.text == gold.text
    if gold.number is not None:
        if not _CLOSED.fullmatch(said.text):
            return False
    elif _relations(gold.text) != _relations(said.text):
        return False  # math-verify reads the end of a chain: 1 = 2 as 2
    return gold.text == said.text or _verify(_parsed(gold.text), _parsed(said.text))


def _words(text: str) -> str:
    """Text that is one or more words, without its wrapping; empty for anything else."""
    text = bare(WRAPPED.sub(r"\1", text)).strip("() ")
    if not _WORDS.fullmatch(text):
        return ""
    return text if len(text) == 1 else " ".join(text.casefold().split())


def _same(gold: Number, said: Number) -> bool:
    if gold.unit and said.unit and gold.unit != said.unit:
        short, long = sorted((gold.unit, said.unit))
        if (short, long[:-1]) != ("degree", "degree "):  # whose scale only one side names
            return False
    # Asked for a percentage, models write the sign or leave it.
    if (gold.percent == said.percent or abs(gold.value) > 1) and _close(gold, said, 1, 1):
        return True
    return _close(gold, said, 100 if gold.percent else 1, 100 if said.percent else 1)


def _close(gold: Number, said: Number, a: int, b: int) -> bool:
    x, y = gold.value / a, said.value / b
    if x == y:
        return True
    rounded = gold if gold.decimal else said
    other = (y if gold.decimal else x).denominator
    for prime in 2, 5:
        while other % prime == 0:
            other //= prime
    if not rounded.decimal or other == 1 or abs(x) < Fraction(1, 1000):
        return False
    return round(x, 6) == round(y, 6)


def _depth(text: str) -> int:
    depth = most = 0
    for c in text:
        depth += (c in "({[") - (c in ")}]")
        most = max(most, depth)
    return most


def _relations(text: str) -> list[str]:
    return sorted(re.findall(r"(?<![<>!])=|\\(?:approx|sim|simeq|equiv|neq?)(?![A-Za-z])", text))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> tuple[Any, ...]:
    from math_verify import LatexExtractionConfig, parse

    return tuple(
        parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            extraction_mode="first_match",
            parsing_timeout=None,  # the pool keeps the deadline
        )
    )


def _verify(gold: tuple[Any, ...], said: tuple[Any, ...]) -> bool:
    from math_verify import verify

    return bool(verify(list(gold), list(said), timeout_seconds=None))
