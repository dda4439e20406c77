"""What a model can do, from n samples of each problem: means over problems and their errors.

Every metric keeps one number for each problem. Ranks may hold any problems and any number of them,
none included; what is computed is that of all problems, and does not depend on who held which.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gift_lightning.functional import pass_at_k

_CHUNK = 1 << 22  # numbers drawn at a time


class ProblemMean(Metric):
    """Mean over problems of one number each, with a bootstrap standard error."""

    full_state_update = False
    is_differentiable = False
    values: list[Tensor] | Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.set_dtype(torch.float64)  # a rank without problems brings an empty tensor of it
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, values: Float[Tensor, " problems"]) -> None:
        """Adds problems."""
        assert isinstance(self.values, list)
        self.values.append(values.detach().to(self.device, torch.float64))

    def compute(self) -> Float[Tensor, ""]:
        """The mean; NaN without problems."""
        return self._sorted().mean()

    def standard_error(self, num_resamples: int = 1000, seed: int = 0) -> Float[Tensor, ""]:
        """Standard deviation of the mean over resamples of the problems, drawn with replacement.

        It says how far another draw of problems, not of samples, would move the mean; NaN for fewer
        than two problems.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn,
            should_sync=self._to_sync and not self._is_synced,
            should_unsync=self._should_unsync,
        ):
            values = self._sorted().cpu()
        n = len(values)
        if n < 2:
            return torch.tensor(float("nan"), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, min(num_resamples, _CHUNK // n))
        means = [
            values[torch.randint(n, (min(rows, num_resamples - i), n), generator=generator)].mean(1)
            for i in range(0, num_resamples, rows)
        ]
        return torch.cat(means).std()

    def _sorted(self) -> Float[Tensor, " problems"]:
        """All values, in an order that does not depend on how they came."""
        if isinstance(self.values, list) and not self.values:
            return torch.zeros(0, dtype=torch.float64)
        return dim_zero_cat(self.values).sort().values


class PassAtK(ProblemMean):
    """Unbiased pass@k: the chance that one of k samples is right."""

    def __init__(self, k: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if k < 1:
            raise ValueError(f"pass@k needs k of at least 1, got {k}.")
        self.k = k

    def update(self, correct: Bool[Tensor, "problems samples"]) -> None:
        """Adds problems by which of their samples are right; raises ValueError for too few."""
        super().update(pass_at_k(correct.shape[1], correct.sum(1).cpu(), self.k))


class AvgAtN(ProblemMean):
    """Mean share of right samples."""

    def update(self, correct: Bool[Tensor, "problems samples"]) -> None:
        """Adds problems by which of their samples are right."""
        super().update(correct.double().mean(1))


class TruncationRate(ProblemMean):
    """Mean share of samples that the length limit cut."""

    def update(self, truncated: Bool[Tensor, "problems samples"]) -> None:
        """Adds problems by which of their samples were cut."""
        super().update(truncated.double().mean(1))


class MajAtN(ProblemMean):
    """Share of problems whose most frequent answer is right."""

    def update(  # type: ignore[override]
        self,
        answers: Sequence[Sequence[str | None]],
        correct: Bool[Tensor, "problems samples"],
    ) -> None:
        """Adds problems by the answers of their samples, None where a sample gives none.

        An answer is right if its first sample is.
        """
        right = []
        for given, good in zip(answers, correct.tolist(), strict=True):
            votes = [None if x is None else normalised(x) for x in given]
            chosen = majority(votes)
            right.append(chosen is not None and good[votes.index(chosen)])
        super().update(torch.tensor(right, dtype=torch.float64))


class DistinctSolutions(ProblemMean):
    """Mean number of different right solutions among the samples of a problem."""

    def update(  # type: ignore[override]
        self, solutions: Sequence[Sequence[str]], correct: Bool[Tensor, "problems samples"]
    ) -> None:
        """Adds problems by the texts of their samples and which of them are right."""
        super().update(
            torch.tensor(
                [
                    len({normalised(x) for x, good in zip(texts, goods, strict=True) if good})
                    for texts, goods in zip(solutions, correct.tolist(), strict=True)
                ],
                dtype=torch.float64,
            )
        )


def majority(answers: Sequence[str | None]) -> str | None:
    """The most frequent answer, on ties the one seen first; None votes for nothing."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__, default=None)  # a Counter keeps the order of arrival


def normalised(text: str) -> str:
    """Without white space."""
    return "".join(text.split())
