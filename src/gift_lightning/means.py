"""Running means and maxima by name, between two log entries."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Means:
    """Weighted means and maxima of what is noted since they were last taken.

    All ranks note the same names; what they noted is taken together.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}
        self._largest: dict[str, float] = {}

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += total
        sums[1] += count

    def raise_to(self, name: str, value: float) -> None:
        """Also to be called with -inf where there is nothing: all ranks need the name."""
        self._largest[name] = max(value, self._largest.get(name, value))

    def take(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """The means and maxima, which start anew; `reduce(x, "sum" or "max")` is over the ranks."""
        sums = reduce(torch.tensor([self._sums[k] for k in sorted(self._sums)]).double(), "sum")
        top = reduce(torch.tensor([self._largest[k] for k in sorted(self._largest)]), "max")
        found = {k: float(s / n) for k, (s, n) in zip(sorted(self._sums), sums, strict=True) if n}
        largest = zip(sorted(self._largest), map(float, top), strict=True)
        found |= {name: value for name, value in largest if value > -math.inf}
        self._sums, self._largest = {}, {}
        return found
