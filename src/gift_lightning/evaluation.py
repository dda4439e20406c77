"""Unbiased pass@k on problems with a verifier, during training."""

from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.functional import pass_at_k
from gift_lightning.generation import generate
from gift_lightning.seeds import keyed_seed


@runtime_checkable
class Verifiable(Protocol):
    """A problem with a prompt and a check of its answers."""

    @property
    def prompt(self) -> str: ...

    def verify(self, text: str) -> bool: ...


class PassAtK(Callback):
    """Samples answers to the datamodule's problems at validation and logs pass@k with its standard
    error over problems.

    The datamodule gives ``eval_problems() -> {set: problems}``; the module has a `model` (a causal
    LM) and its `tokenizer`. Logged for each set: ``val/<set>/pass@<k>``, ``val/<set>/pass@<k>_se``
    and ``val/<set>/truncated`` (share of the samples without an end token, all counted as wrong).
    Every evaluation draws from the same random streams, so that differences between two of them are
    differences of the model. Ranks share the problems, and all get the same numbers.

    Attributes:
        history: one dict of metrics for each evaluation, with its `step`.
        completions: three of the last evaluation: set, prompt, completion, correct (rank 0 only).
    """

    def __init__(
        self,
        num_problems: int = 256,
        num_samples: int = 16,
        ks: Sequence[int] = (1, 16),
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 32,
        every: int = 1,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        """
        Args:
            num_problems: from each set, its first ones; fewer where it has fewer.
            num_samples: completions of each problem.
            ks: budgets to report, at most num_samples.
            temperature: of sampling; 0 is greedy.
            top_p: mass of the likeliest tokens that are sampled from.
            max_new_tokens: length limit of a completion.
            every: evaluate at every n-th validation run (and before training).
            batch_size: completions sampled side by side.
            seed: of the sampling streams.

        Raises:
            ValueError: a k outside 1 to num_samples, or a count below 1.
        """
        for name, value in {
            "num_problems": num_problems,
            "num_samples": num_samples,
            "max_new_tokens": max_new_tokens,
            "every": every,
            "batch_size": batch_size,
        }.items():
            if value < 1:
                raise ValueError(f"PassAtK.{name} must be at least 1, got {value}: raise it.")
        if not ks or not all(1 <= k <= num_samples for k in ks):
            raise ValueError(
                f"PassAtK.ks must lie between 1 and num_samples={num_samples}, got {list(ks)}: "
                "change one of them."
            )
        self.num_problems, self.num_samples, self.ks = num_problems, num_samples, tuple(ks)
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.every, self.batch_size, self.seed = every, batch_size, seed
        self.history: list[dict[str, float]] = []
        self.completions: list[dict[str, Any]] = []
        self._validations = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(trainer.datamodule, "eval_problems"):  # type: ignore[attr-defined]
            raise ValueError(
                "PassAtK needs a datamodule with eval_problems(), such as CountdownData: "
                "set data, or drop PassAtK."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._validations = state_dict["history"], state_dict["validations"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validations += 1
            if self._validations % self.every:
                return
        metrics = self.evaluate(trainer, pl_module)
        pl_module.log_dict(metrics)
        self.history.append({"step": trainer.global_step, **metrics})

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics of all sets, the same on every rank."""
        metrics: dict[str, float] = {}
        self.completions = []
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        for name, problems in datamodule.eval_problems().items():
            problems = problems[: self.num_problems]
            counts = self._sampled(trainer, pl_module, name, problems)
            for k in self.ks:
                solved = pass_at_k(self.num_samples, counts[:, 0], k)
                metrics[f"val/{name}/pass@{k}"] = solved.mean().item()
                metrics[f"val/{name}/pass@{k}_se"] = (
                    solved.std().item() / len(solved) ** 0.5 if len(solved) > 1 else 0.0
                )
            metrics[f"val/{name}/truncated"] = (
                counts[:, 1].double().mean().item() / self.num_samples
            )
        self.completions = self.completions[:: max(1, len(self.completions) // 3)][:3]
        return metrics

    def _sampled(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        name: str,
        problems: Sequence[Verifiable],
    ) -> Tensor:
        """Correct and truncated samples of each problem, int64 [problems, 2], summed over ranks."""
        model = cast(PreTrainedModel, pl_module.model)
        tokenizer = cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        mine = range(trainer.global_rank, len(problems), trainer.world_size)
        groups = generate(
            model,
            [tokenizer(problems[i].prompt)["input_ids"] for i in mine],
            self.num_samples,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            eos_ids=[tokenizer.eos_token_id],
            pad_id=tokenizer.pad_token_id,
            seed=keyed_seed(self.seed, "evaluation", name),
            batch_size=self.batch_size,
            keys=mine,
        )
        counts = [[0, 0] for _ in problems]
        for i, group in zip(mine, groups, strict=True):
            for k, completion in enumerate(group):
                text = str(
                    tokenizer.decode(completion.tokens[: -1 if completion.finished else None])
                )
                correct = completion.finished and problems[i].verify(text)
                counts[i][0] += correct
                counts[i][1] += not completion.finished
                if k == 0:
                    shown = {"set": name, "prompt": problems[i].prompt}
                    self.completions.append({**shown, "completion": text, "correct": correct})
        device = pl_module.device
        summed = trainer.strategy.reduce(torch.tensor(counts, device=device), reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed
