"""The step guard: no non-finite number ever enters the weights, and none goes unnoticed."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gift_lightning.skeleton import full


class Diverged(RuntimeError):
    """Several optimizer steps in a row had to be skipped."""


class StepGuard:
    """Decides for each optimizer step whether it is taken, and counts those that are not.

    Args:
        max_skipped: skipped steps in a row that stop the run.
    """

    def __init__(self, max_skipped: int) -> None:
        if max_skipped < 1:
            raise ValueError(f"model.max_skipped_steps must be 1 or more, got {max_skipped}.")
        self.max_skipped = max_skipped
        self.skipped: Counter[str] = Counter()
        self.in_a_row = 0
        self.decided = 0

    def decide(self, loss: Tensor, norm: Tensor, num_tokens: int, patience: int = 1) -> str | None:
        """Why this step must be skipped, or None.

        Args:
            loss: [] of the whole step, over all ranks.
            norm: [] of the whole step's gradient, before clipping.
            num_tokens: supervised tokens of the whole step.
            patience: factor on the steps in a row that are borne, for a gradient scaler that
                finds its scale by overflowing.

        Raises:
            Diverged: after `max_skipped` non-finite steps in a row.
        """
        self.decided += 1
        if num_tokens == 0:
            reason = "no token has anything to teach"
        elif not bool(loss.isfinite()):
            reason = f"loss is {float(loss)}"
        elif not bool(norm.isfinite()):
            reason = f"gradient norm is {float(norm)}"
        else:
            self.in_a_row = 0
            return None
        self.skipped[reason] += 1
        self.in_a_row += num_tokens > 0
        if self.in_a_row >= self.max_skipped * patience:
            raise Diverged(
                f"{self.in_a_row} optimizer steps in a row were skipped, the last because {reason}:"
                " lower the learning rate or look at the samples named above."
            )
        return reason

    def state_dict(self) -> dict[str, object]:
        return {"skipped": dict(self.skipped), "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict) -> None:
        self.skipped = Counter(state["skipped"])
        self.in_a_row = state["in_a_row"]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm of all gradients, [] on their device; sharded gradients are gathered."""
    groups = _by_mesh(parameters)
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norms = [full(torch.nn.utils.get_total_norm(group)) for group in gradients]
    return torch.stack(norms).norm() if len(norms) > 1 else [*norms, torch.zeros(())][0]


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float, norm: Tensor) -> None:
    """Scales all gradients so that their norm, which is known, is at most the largest."""
    for group in _by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(group, largest, norm)


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those with gradients, apart by where they are spread: tensor parallelism has two kinds."""
    groups: dict[object, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            groups.setdefault(getattr(p.grad, "device_mesh", None), []).append(p)
    return list(groups.values())
