"""Countdown: reach a target with every given number used exactly once, by ``+``, ``-`` and ``*``.

A problem is one line, ``3 5 7 2 > 24 : ``, and a completion is an answer in one of `FORMATS`. Most
problems have many right answers, so a one-hot target teaches something false about them: the
natural place to look at target distributions. Everything here is a pure function of its arguments,
and text is parsed by hand, never evaluated.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import Literal, NamedTuple, TypeAlias

from gift_lightning.seeds import keyed_seed

Split = Literal["train", "demonstration", "validation", "test"]
Kind = Literal["any", "in", "out", "drawn"]


class Operation(NamedTuple):
    """An inner node of an expression."""

    operator: str
    left: "Tree"
    right: "Tree"


Tree: TypeAlias = int | Operation


COUNT = 4  # numbers in a problem
LARGEST = 9  # numbers are 1 to LARGEST
TARGETS = range(100)
OPERATORS = "+-*"
FORMATS = ("= {}", "answer: {}", "<a>{}</a>", "{} = {target}")

_MAX_CHARACTERS = 128  # a longer completion is wrong without being read
_MAX_DEPTH = 16
# Percent of the problems.
_SHARES: dict[Split, int] = {"train": 50, "demonstration": 25, "validation": 15, "test": 10}
_EXPRESSION = r"([0-9+\-*() ]{1,128})"
_ANSWERS = tuple(
    re.compile(form.format(_EXPRESSION), re.ASCII)
    for form in ("(?:= *)?{}", "answer: *{}", "<a>{}</a>", r"{}= *([0-9]{{1,9}})")
)
_TOKEN = re.compile(r" *(0|[1-9][0-9]{0,8}|[-+*()])", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """The numbers, in the order in which the prompt shows them, and the value to reach."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} > {self.target} : "

    def verify(self, text: str) -> bool:
        return verify(text, self.numbers, self.target)


# Verifying


def verify(text: str, numbers: Iterable[int], target: int) -> bool:
    """Whether `text` is one right answer in a known format, with each number used once.

    The whole completion must be the answer (spaces around it apart): a second answer, an echo of
    the prompt or a remark makes it wrong. There is no unary sign, no division, no power, and only
    ASCII digits count. Never raises.
    """
    if len(text) > _MAX_CHARACTERS:
        return False
    text = text.strip(" \n")
    for pattern in _ANSWERS:
        if match := pattern.fullmatch(text):
            expression, *stated = match.groups()
            parsed = parse(expression)
            # Only the last format states a value.
            return (
                parsed is not None
                and parsed[0] == target
                and all(int(value) == target for value in stated)
                and Counter(parsed[1]) == Counter(numbers)
            )
    return False


def parse(expression: str) -> tuple[int, list[int]] | None:
    """Value and numbers (in order) of an expression; None if malformed or nested too deep."""
    tokens, end = [], 0
    expression = expression.rstrip(" ")
    while match := _TOKEN.match(expression, end):
        tokens.append(match[1])
        end = match.end()
    if end != len(expression):
        return None
    tokens.append("")  # sentinel: there is always a next token to look at
    used: list[int] = []
    try:
        value, at = _sum(tokens, 0, 0, used)
    except SyntaxError:
        return None
    return (value, used) if at == len(tokens) - 1 else None


def _sum(tokens: list[str], at: int, depth: int, used: list[int]) -> tuple[int, int]:
    value, at = _product(tokens, at, depth, used)
    while (operator := tokens[at]) in ("+", "-"):
        term, at = _product(tokens, at + 1, depth, used)
        value = value + term if operator == "+" else value - term
    return value, at


def _product(tokens: list[str], at: int, depth: int, used: list[int]) -> tuple[int, int]:
    value, at = _factor(tokens, at, depth, used)
    while tokens[at] == "*":
        factor, at = _factor(tokens, at + 1, depth, used)
        value *= factor
    return value, at


def _factor(tokens: list[str], at: int, depth: int, used: list[int]) -> tuple[int, int]:
    if tokens[at].isdecimal():
        used.append(int(tokens[at]))
        return used[-1], at + 1
    if tokens[at] != "(" or depth == _MAX_DEPTH:
        raise SyntaxError
    value, at = _sum(tokens, at + 1, depth + 1, used)
    if tokens[at] != ")":
        raise SyntaxError
    return value, at + 1


# Solving


@cache
def _halves(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All ordered ways to part sorted numbers into two non-empty sorted groups."""
    places = range(len(numbers))
    found = set()
    for size in range(1, len(numbers)):
        for left in combinations(places, size):
            right = tuple(numbers[i] for i in places if i not in left)
            found.add((tuple(numbers[i] for i in left), right))
    return tuple(sorted(found))


@cache
def _reachable(numbers: tuple[int, ...], operators: str) -> frozenset[int]:
    if len(numbers) == 1:
        return frozenset(numbers)
    values: set[int] = set()
    for left, right in _halves(numbers):
        for a in _reachable(left, operators):
            for b in _reachable(right, operators):
                values.update(_apply(operator, a, b) for operator in operators)
    return frozenset(values)


def _apply(operator: str, a: int, b: int) -> int:
    return a + b if operator == "+" else a - b if operator == "-" else a * b


def reachable(numbers: Iterable[int], operators: str = OPERATORS) -> frozenset[int]:
    """All values that expressions using each number once can have."""
    return _reachable(tuple(sorted(numbers)), operators)


def solutions(numbers: Iterable[int], target: int, operators: str = OPERATORS) -> list[str]:
    """All right expressions, sorted, without needless parentheses or spaces."""
    return sorted({render(tree) for tree in _trees(tuple(sorted(numbers)), target, operators)})


def _trees(numbers: tuple[int, ...], target: int, operators: str) -> Iterator[Tree]:
    if target not in _reachable(numbers, operators):
        return
    if len(numbers) == 1:
        yield numbers[0]
    for left, right in _halves(numbers):
        for operator in operators:
            for a in _reachable(left, operators):
                for b in _reachable(right, operators):
                    if _apply(operator, a, b) == target:
                        for one in _trees(left, a, operators):
                            for other in _trees(right, b, operators):
                                yield Operation(operator, one, other)


def render(tree: Tree, every: bool = False) -> str:
    """Text of a tree, with parentheses where the value needs them or around `every` operation."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    a, b = render(left, every), render(right, every)
    if isinstance(left, Operation) and (every or (operator == "*" and left.operator != "*")):
        a = f"({a})"
    if isinstance(right, Operation) and (every or (operator != "+" and right.operator != "*")):
        b = f"({b})"
    return a + operator + b


def random_tree(rng: random.Random, numbers: list[int]) -> Tree:
    """A random expression of all the numbers, each cut and operator with equal probability."""
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randint(1, len(numbers) - 1)
    operator = rng.choice(OPERATORS)
    return Operation(operator, random_tree(rng, numbers[:cut]), random_tree(rng, numbers[cut:]))


# Problems


def split_of(numbers: Iterable[int], target: int) -> Split:
    """The split of a problem: by hash, so that neither the numbers' order nor a seed moves it."""
    place = keyed_seed(0, "countdown", *sorted(numbers), target) % 100
    for split, share in _SHARES.items():
        if place < share:
            return split
        place -= share
    raise AssertionError("the shares add up to 100")


@cache
def _universe(split: Split, kind: Kind) -> tuple[tuple[tuple[int, ...], int], ...]:
    found = []
    for numbers in combinations_with_replacement(range(1, LARGEST + 1), COUNT):
        values = reachable(numbers, "+-" if kind == "in" else OPERATORS)
        if kind == "out":
            values -= reachable(numbers, "+-")
        found += [(numbers, t) for t in TARGETS if t in values and split_of(numbers, t) == split]
    return tuple(found)


def problems(split: Split, n: int, seed: int = 0, kind: Kind = "any") -> list[Problem]:
    """`n` different solvable problems of a split.

    Args:
        kind: ``in``: solvable with + and - alone, as the demonstrations are; ``out``: solvable only
            with a ``*``; ``any``: each with equal probability; ``drawn``: as often as random
            expressions have its value, which is what the base model was pretrained on.

    Raises:
        ValueError: the split has fewer problems of this kind.
    """
    universe = _universe(split, "any" if kind == "drawn" else kind)
    if n > len(universe):
        raise ValueError(
            f"Countdown has {len(universe)} problems of kind {kind!r} in the {split} split, "
            f"fewer than the {n} asked for: ask for fewer."
        )
    rng = random.Random(keyed_seed(seed, "countdown problems", split, kind))
    if kind == "drawn":
        return _drawn(rng, split, n)
    return [
        Problem(tuple(rng.sample(numbers, COUNT)), target)
        for numbers, target in rng.sample(universe, n)
    ]


def _drawn(rng: random.Random, split: Split, n: int) -> list[Problem]:
    found: dict[tuple[tuple[int, ...], int], Problem] = {}
    while len(found) < n:
        numbers = [rng.randint(1, LARGEST) for _ in range(COUNT)]
        parsed = parse(render(random_tree(rng, numbers)))
        assert parsed is not None
        if (target := parsed[0]) in TARGETS and split_of(numbers, target) == split:
            key = (tuple(sorted(numbers)), target)
            found.setdefault(key, Problem(tuple(rng.sample(numbers, COUNT)), target))
    return list(found.values())
