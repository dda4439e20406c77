"""`gift plan`: how much memory a run takes on each device, before it takes any."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gift_lightning.branches import blocks
from gift_lightning.cli import GiftCLI
from gift_lightning.footprint import Footprint
from gift_lightning.models import base_model
from gift_lightning.references import FrozenCopy, Reference
from gift_lightning.sharding import data_parallel_size, units
from gift_lightning.sizes import Setting, Sizes

CARDS = (8, 16, 24, 48, 80, 141)
"""Memory of common cards in GB."""
MARGIN = 0.1
"""Of a card that is left free: what the driver and its context take, and fragmentation."""

_PARTS = {
    "parameters": "parameters",
    "gathered": "gathered units",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "reference": "reference",
    "activations": "activations",
    "head": "head chunk",
    "kv_cache": "KV cache",
}
_SHARDED = ("parameters", "gradients", "optimizer", "reference")


@dataclass(frozen=True)
class Plan:
    """What a run takes on each device.

    Attributes:
        about: what is trained.
        training: bytes by part at the peak of an optimizer step.
        rollout: bytes by part at the peak of a rollout, or None without rollouts and where an
            engine samples from weights that need not be gathered.
        sizes: of the largest micro-batch.
        strategy: "one device", "ddp" or "fsdp2".
        devices: that the run is spread over.
    """

    about: str
    training: dict[str, int]
    rollout: dict[str, int] | None
    sizes: Sizes
    strategy: str
    devices: int

    @property
    def peak(self) -> int:
        """Bytes on each device."""
        return max(sum(x.values()) for x in (self.training, self.rollout or {}))

    def fits(self, card: int) -> bool:
        """Whether a card of so many GB (10⁹ bytes) is enough, with the margin."""
        return self.peak <= (1 - MARGIN) * card * 1e9


class _Described(GiftCLI):
    """Reads what `gift fit` reads, and makes a plan in place of a run."""

    plan: Plan

    def before_instantiate_classes(self) -> None:
        """Nothing: a plan takes no folder."""

    def instantiate_classes(self) -> None:
        said = self.config[self.subcommand].trainer
        devices = _devices(said.devices) * said.num_nodes
        options = getattr(said.strategy, "init_args", {})
        setting = Setting(
            said.accelerator != "cpu",
            said.precision or "32-true",
            said.accumulate_grad_batches,
            devices,
            data_parallel_size(devices, int(options.get("tensor_parallel_size", 1))),
        )
        footprint = Footprint(self._build, setting)
        strategy = self._get(self.config_init, "trainer").strategy
        self.plan = planned(footprint, strategy)

    def _build(self) -> Any:
        self.config_init = self.parser.instantiate_classes(self.config)
        return self._get(self.config_init, "model"), self._get(self.config_init, "data")

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing: nothing is run."""


def main(words: Sequence[str]) -> None:
    """`gift plan`."""
    show(plan_of(words))


def plan_of(words: Sequence[str]) -> Plan:
    """The plan of `gift fit WORDS`."""
    return _Described(["fit", *words]).plan


def planned(footprint: Footprint, strategy: str | Strategy = "auto") -> Plan:
    """The plan of a footprint that is spread over devices by a strategy.

    Under DDP each device has all of it, and once more the gradients, in the buckets that are
    exchanged and that stay. Under FSDP2 parameters, gradients, optimizer states and a FrozenCopy
    are divided by the devices, and a unit at a time is gathered: what is outside the blocks stays,
    two blocks are there while the next is fetched, a block's gradients until they are spread; a
    FrozenCopy's head stays as well. A rollout gathers all weights into a copy beside the shards,
    for whatever engine. Tensor parallelism divides the blocks' weights once more, and what is
    outside them by the replicas only; the blocks' activations, which it divides too, count whole.

    Raises:
        ValueError: the strategy is another.
    """
    devices, replicas = footprint.setting.devices, footprint.setting.replicas
    name = _strategy(strategy, devices)
    training, rollout = footprint.training(), footprint.rollout()
    if name != "fsdp2" and not footprint.sizes.decoded:
        rollout = None  # what samples is elsewhere, and nothing is gathered for it
    model = footprint.module.model
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    for phase in (training, rollout):
        if phase is None:
            continue
        if name == "ddp":
            beside = 0 if _views(strategy) else phase.get("gradients", 0)
            phase["gradients"] = trained + beside
        if name == "fsdp2":
            whole = phase["parameters"]
            sizes = [sum(p.nbytes for p in x.parameters()) for x in blocks(base_model(model))]
            outside, largest = whole - sum(sizes), max(sizes, default=0)
            # What is inside of the blocks is divided by the devices, the rest by the replicas.
            share = Fraction(whole - outside, devices) + Fraction(outside, replicas)
            for part in _SHARDED:
                phase[part] = math.ceil(phase.get(part, 0) * share / whole)
            unit = min(outside + 3 * largest * replicas // devices, whole)
            # A copy takes as it is what a device holds alone.
            copied = (whole - outside) * (devices > 1) + outside * (replicas > 1)
            phase["gathered"] = unit if phase is training else copied
            phase["gathered"] += sum(map(_kept, footprint.module.references))
    about = footprint.module.about
    return Plan(about, training, rollout, footprint.sizes, name, devices)


def _kept(reference: Reference) -> int:
    """Bytes of a sharded reference that are gathered from its first pass on: those of its head's
    unit, whose rows the loss reads chunk by chunk."""
    if not isinstance(reference, FrozenCopy) or reference.device != "policy":
        return 0
    assert reference.policy is not None
    apart = {p for unit in units(reference.policy) for p in unit.parameters()}
    return sum(p.nbytes for p in reference.policy.parameters() if p not in apart)


def _devices(said: Any) -> int:
    """How many a config asks for; "auto" and -1, as many as there are, count as those of here."""
    if isinstance(said, list):
        return len(said)
    if said in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1)
    return len(said.strip(", ").split(",")) if isinstance(said, str) and "," in said else int(said)


def _strategy(strategy: str | Strategy, devices: int) -> str:
    name = (strategy if isinstance(strategy, str) else type(strategy).__name__).lower()
    if name == "fsdp2":
        return name
    if name.startswith("ddp") or name == "auto":
        return "ddp" if devices > 1 else "one device"
    raise ValueError(f"gift plan knows trainer.strategy auto, ddp and fsdp2, not {name}.")


def _views(strategy: str | Strategy) -> bool:
    """Whether gradients live in DDP's buckets, and not beside them."""
    options = strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else {}
    return bool(options.get("gradient_as_bucket_view"))


def show(plan: Plan, console: Console | None = None) -> None:
    """Prints the plan: a table of its parts, and a line for each card."""
    console = console or Console()
    phases = {"training": plan.training}
    if plan.rollout is not None:
        phases["rollout"] = plan.rollout
    table = Table("GB at the peak of", *phases, box=SIMPLE, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part, title in _PARTS.items():
        values = [phase.get(part, 0) for phase in phases.values()]
        if any(values):
            table.add_row(title, *(f"{x / 1e9:.3f}" for x in values))
    table.add_section()
    totals = [sum(phase.values()) for phase in phases.values()]
    table.add_row("in all", *(f"{x / 1e9:.3f}" for x in totals), style="bold")
    where = plan.strategy if plan.devices == 1 else f"{plan.strategy}, {plan.devices} devices"
    say = {"highlight": False, "markup": False, "soft_wrap": True}
    console.print(f"{plan.about}; {where}; per device:", **say)  # type: ignore[arg-type]
    console.print(table)
    console.print(_assumed(plan.sizes), **say)  # type: ignore[arg-type]
    for card in CARDS:
        word = "fits" if plan.fits(card) else "does not fit"
        console.print(f"{card:>4} GB: {word}", **say)  # type: ignore[arg-type]
    console.print(
        f"1 GB is 10⁹ bytes, 0.93 GiB. {MARGIN:.0%} of a card are left to its driver and to "
        "fragmentation.",
        **say,  # type: ignore[arg-type]
    )


def _assumed(sizes: Sizes) -> str:
    parts = []
    if sizes.lengths:
        count, longest = len(sizes.lengths), max(sizes.lengths)
        parts.append(f"{count} demonstrations of up to {longest} tokens, all learned")
    if sizes.completions:
        length = f"{sizes.prompt} + {sizes.completion}"
        parts.append(f"{sizes.completions} completions of up to {length} tokens")
    text = f"A micro-batch of {' and '.join(parts)}"
    return f"{text}; {sizes.decoded} are sampled side by side." if sizes.decoded else f"{text}."
