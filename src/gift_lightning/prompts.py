"""The stream that RL trains on: which prompts to roll out, and which part of a rollout to train."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from gift_lightning.examples import Ledger
from gift_lightning.order import Resumable, deal, permutation
from gift_lightning.position import PositionedData
from gift_lightning.problems import Problem, Problems, prompt_tokens
from gift_lightning.records import Rejected
from gift_lightning.replicas import Replicas
from gift_lightning.seeds import keyed_seed


class Ticket(NamedTuple):
    """One micro-batch of the stream, before its rollout exists."""

    rollout: int
    """Number of the rollout, counted over the run."""
    prompts: tuple[int, ...]
    """Indices of the problems that are rolled out."""
    iteration: int
    """Which pass over the rollout."""
    step: int
    """Which optimizer step of that pass."""
    part: int
    """Which micro-batch of that step."""


@dataclass(eq=False)
class Tickets(Resumable):
    """The tickets of an epoch: every problem is rolled out once, but for a last short rollout."""

    num_problems: int
    prompts_per_rollout: int
    num_iterations: int
    num_steps: int
    """Optimizer steps in one pass over a rollout."""
    accumulate: int
    samples_per_step: int
    seed: int = 0

    @property
    def num_rollouts(self) -> int:
        return self.num_problems // self.prompts_per_rollout

    def __len__(self) -> int:
        return self.num_rollouts * self.num_iterations * self.num_steps * self.accumulate

    def __iter__(self) -> Iterator[Ticket]:
        order = permutation(self.num_problems, self.seed, "prompts", self.epoch).tolist()
        size, sizes = self.prompts_per_rollout, (self.num_iterations, self.num_steps)
        for i in range(self.skipped, len(self)):
            r, iteration, step, part = np.unravel_index(
                i, (self.num_rollouts, *sizes, self.accumulate)
            )
            prompts = tuple(order[r * size : (r + 1) * size])
            number = self.epoch * self.num_rollouts + int(r)
            yield Ticket(number, prompts, int(iteration), int(step), int(part))


class _Passing(Dataset[Any]):
    """What a loader needs to hand on the items of its sampler."""

    def __getitem__(self, item: Any) -> Any:
        return item


class PromptData(PositionedData):
    """Prompts for RL. A rollout samples `num_generations` completions for each of
    `prompts_per_rollout` prompts; they are trained in steps of batch_size x accumulate_grad_batches
    x devices completions, `num_iterations` times over.

    Which prompts, completions and steps these are depends on the seed alone, not on the number of
    devices or micro-batches.

    Args:
        train: where the problems come from.
        prompts_per_rollout: prompts of one rollout, over all devices.
        num_generations: completions of each, the group whose rewards are compared.
        batch_size: completions per micro-batch and device; by default a rollout is one step.
        num_iterations: passes over each rollout.
        max_prompt_length: problems with longer prompts are not used, and counted.
        max_rejected: refuse to start if a larger share of the problems cannot be used.
        chat: make the prompt a user's turn of the tokenizer's chat template.
        packing: put short sequences into one row; exact, and faster than padding.
        share_prompts: read a prompt once for up to eight of its completions; faster where prompts
            are long beside completions, see docs/grpo.md.
        seed: of the order and of the sampling.
    """

    sampler: Tickets | None = None

    def __init__(
        self,
        train: Problems,
        prompts_per_rollout: int = 16,
        num_generations: int = 8,
        batch_size: int | None = None,
        num_iterations: int = 1,
        max_prompt_length: int | None = 512,
        max_rejected: float = 0.05,
        chat: bool = False,
        packing: bool = True,
        share_prompts: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"prompts_per_rollout": prompts_per_rollout, "batch_size": batch_size}
        counts |= {"num_iterations": num_iterations}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}.")
        if num_generations < 2:
            raise ValueError(
                f"data.num_generations must be at least 2, got {num_generations}: an advantage "
                "compares the completions of a group."
            )
        if share_prompts and not packing:
            raise ValueError(
                "data.share_prompts puts completions into one row, which data.packing: false does "
                "not allow: change one of them."
            )
        if max_prompt_length is not None and max_prompt_length < 1:
            raise ValueError(f"data.max_prompt_length must be at least 1, got {max_prompt_length}.")
        self.train_problems = train
        self.prompts_per_rollout, self.num_generations = prompts_per_rollout, num_generations
        self._batch_size, self.num_iterations = batch_size, num_iterations
        self.batch_size = batch_size or 0
        self.max_prompt_length, self.max_rejected = max_prompt_length, max_rejected
        self.chat, self.seed = chat, seed
        self.packing, self.share_prompts = packing, share_prompts
        self.ledger: dict[str, Ledger] = {}
        self.problems: list[Problem] = []
        self.prompt_ids: list[list[int]] = []
        self._prepared_for: PreTrainedTokenizerBase | None = None

    def setup(self, stage: str) -> None:
        """Loads and tokenises the problems for the trainer's module.

        Raises:
            ValueError: they cannot be read, too many are too long, or the sizes do not fit.
        """
        trainer = self.trainer
        assert trainer is not None
        self.check_order()
        module: Any = trainer.lightning_module
        if self._prepared_for is not module.tokenizer:
            self._tokenise(module.tokenizer)
            self._prepared_for = module.tokenizer
            if trainer.is_global_zero:
                self.report()
        completions = self.prompts_per_rollout * self.num_generations
        accumulate = trainer.accumulate_grad_batches
        share = accumulate * Replicas.of(trainer).number
        self.batch_size = self._batch_size or -(-completions // share)
        per_step = self.batch_size * share
        if completions % per_step:
            raise ValueError(
                f"a rollout of {completions} completions (data.prompts_per_rollout x "
                f"data.num_generations) is no multiple of the {per_step} of an optimizer step "
                "(data.batch_size x trainer.accumulate_grad_batches x devices): change one of them."
            )
        if len(self.problems) < self.prompts_per_rollout:
            raise ValueError(
                f"there are {len(self.problems)} problems, fewer than data.prompts_per_rollout="
                f"{self.prompts_per_rollout}: lower it or give more."
            )
        self.sampler = Tickets(
            len(self.problems),
            self.prompts_per_rollout,
            self.num_iterations,
            completions // per_step,
            accumulate,
            per_step,
            self.seed,
        )

    def _tokenise(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ledger = self.ledger["train"] = Ledger("train")
        self.problems, self.prompt_ids = [], []
        for problem in self.train_problems.load():
            ids = prompt_tokens(tokenizer, problem, self.chat)
            if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
                reason = f"prompt longer than max_prompt_length {self.max_prompt_length}"
                ledger.rejected.append(Rejected(f"{reason}: {len(ids)} tokens", problem.origin))
                continue
            self.problems.append(problem)
            self.prompt_ids.append(ids)
        ledger.used = len(self.problems)
        ledger.check(self.max_rejected)

    def report(self, console: Console | None = None) -> None:
        """Print what became of the problems, and one prompt."""
        console = console or Console()
        counts = ", ".join(
            f"{count} {outcome}" for outcome, count in self.ledger["train"].counts.items()
        )
        console.print(f"Prompts: {counts}. The first:", highlight=False)
        console.print(str(self.problems[0].prompt), highlight=False, markup=False)

    @property
    def identity(self) -> dict[str, str | int]:
        assert self.sampler is not None
        columns = json.dumps([problem.columns for problem in self.problems], sort_keys=True)
        digest = hashlib.sha256(f"{self.prompt_ids} {columns}".encode()).hexdigest()
        return {
            "samples": digest,
            "seed": self.seed,
            "samples per step": self.sampler.samples_per_step,
            "prompts_per_rollout": self.prompts_per_rollout,
            "num_generations": self.num_generations,
            "num_iterations": self.num_iterations,
        }

    def train_dataloader(self) -> DataLoader[Ticket]:
        # Without workers and with a known length, so that no ticket is taken before its turn.
        own = torch.Generator().manual_seed(keyed_seed(self.seed, "loader"))
        return DataLoader(
            _Passing(), None, sampler=self.sampler, collate_fn=_Passing().__getitem__, generator=own
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """One empty item: validation is what callbacks such as GenerationEval make of it."""
        return DataLoader([0], None)  # type: ignore[arg-type]

    def replacements(self, rollout: int, tried: set[int], num: int) -> list[int]:
        """Other problems for groups without signal, as many as there are."""
        order = permutation(len(self.problems), self.seed, "replacements", rollout).tolist()
        return [i for i in order if i not in tried][:num]

    @property
    def parts_per_rollout(self) -> int:
        """Micro-batches of one rank that train on the same rollout."""
        assert self.sampler is not None
        return self.num_iterations * self.sampler.num_steps * self.sampler.accumulate

    def window(self, ticket: Ticket, num_completions: int) -> np.ndarray:
        """The completions of a ticket's optimizer step, of all ranks: the same for any number of
        them."""
        assert self.sampler is not None
        key = f"{ticket.rollout}/{ticket.iteration}"
        order = permutation(num_completions, self.seed, "completions", key)
        size = self.sampler.samples_per_step
        return order[ticket.step * size : (ticket.step + 1) * size]

    def part(
        self, ticket: Ticket, window: np.ndarray, lengths: np.ndarray, world: int, rank: int
    ) -> tuple[int, ...]:
        """The completions of a ticket's micro-batch on one rank, of those of its step; `lengths`
        are the tokens of every completion of the rollout."""
        if self.share_prompts:  # a group's completions side by side, on one rank
            order = np.sort(window).reshape(world, -1).T.ravel()
        else:  # as little padding as can be
            order = window[np.argsort(-lengths[window], kind="stable")]
        return deal(order, self.batch_size, world, rank)[ticket.part]
