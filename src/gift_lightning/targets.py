"""The target distributions that a config names; each class is one row of docs/targets.md.

Defaults are the publication's. The plain rows stand here; the others by what they read: `gibbs` the
reference tilted towards the label, `weights` the student, `ratios` the reference or an old policy,
`anchors` a divergence, `teachers` a teacher.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gift_lightning.anchors import ASFT, GEM, SFTKL, EntropyBonus
from gift_lightning.distribution import Scalar
from gift_lightning.gibbs import GIFT, GIFTExact
from gift_lightning.ratios import FLOW, IWSFT, PSFT, STM
from gift_lightning.target import Target, Tokens, require_number
from gift_lightning.teachers import Distillation, TargetSFT
from gift_lightning.weights import (
    DEFT,
    DFT,
    EAFT,
    IDFT,
    TALR,
    BeyondLog,
    CHORDPhi,
    Focal,
    LUFFYShaping,
    ProFiT,
)

__all__ = [
    "ASFT",
    "DEFT",
    "DFT",
    "EAFT",
    "FLOW",
    "GEM",
    "GIFT",
    "IDFT",
    "IWSFT",
    "PSFT",
    "SFTKL",
    "STM",
    "TALR",
    "BeyondLog",
    "CHORDPhi",
    "Distillation",
    "EntropyBonus",
    "Focal",
    "GIFTExact",
    "LUFFYShaping",
    "LabelSmoothing",
    "OneHot",
    "ProFiT",
    "Target",
    "TargetSFT",
]


@dataclass(frozen=True)
class OneHot(Target):
    """Standard SFT: −log p_y."""

    def label_weight(self, t: Tokens) -> Scalar:
        return 1.0


@dataclass(frozen=True)
class LabelSmoothing(Target):
    """(1 − ε)·δ + ε·uniform over the whole vocabulary, label included (torch's convention)."""

    epsilon: float
    """Mass spread over the vocabulary, 0.1 by convention."""

    def __post_init__(self) -> None:
        require_number(self, "epsilon", 0, 1)

    def label_weight(self, t: Tokens) -> Scalar:
        return 1 - self.epsilon

    def residual(self, t: Tokens) -> Tensor | None:
        return torch.ones_like(t.logits[:, :1]) / t.num_classes
