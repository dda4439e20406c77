"""Evaluation by sampling, during training or alone: how often a model is right, how variously."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn

from gift_lightning.completions import Row, Solved, read_solved, solved, write
from gift_lightning.functional import pass_at_k
from gift_lightning.metrics import (
    AvgAtN,
    DistinctSolutions,
    MajAtN,
    PassAtK,
    ProblemMean,
    TruncationRate,
)
from gift_lightning.module import PolicyModule, training_ends
from gift_lightning.problems import Problem, Problems
from gift_lightning.sampler import Sampler, Settings

_MEASURES = r"((pass|avg|maj)@\d+|truncated|distinct)(_se)?|not_scorable|coverage(_kept)?@\d+"


class GenerationEval(Callback):
    """Samples completions of problems at validation, before training too, and logs for each set

    - ``val/<set>/pass@<k>``, ``avg@<n>``, ``maj@<n>`` (where a reward extracts answers),
      ``truncated``, ``distinct`` (different right solutions of a problem), with a bootstrap error
      over problems as ``..._se``, and ``not_scorable``, the share of samples that no reward could
      judge. These, and truncated ones, count as wrong;
    - ``coverage@<G>``: the share of problems that have a right sample among G, which is pass@G. RL
      with groups of G can only learn from these: look at it before RL starts;
    - ``coverage_kept@<G>``: of the problems that the base covers, the share that this model covers
      too. The base is a file of its samples (`baseline`), by default what this run saw before its
      first step: in SFT from the base, the base itself. As a problem is covered with some
      probability, the share is Σ base·model / Σ base over problems, of their unbiased pass@G. Both
      are drawn from the same random streams, so it is 1 for an unchanged model at G = n.

    Every evaluation draws from the same random streams, so that differences between two of them are
    differences of the model. All samples are written to ``completions/`` in the run's folder. Ranks
    share the problems, and all get the same numbers.

    Attributes:
        history: one dict of metrics for each evaluation, with its `step`.
        completions: some samples of the last evaluation, evenly over the sets.
    """

    def __init__(
        self,
        sets: dict[str, Problems] | None = None,
        rewards: Sequence[str | dict[str, Any]] = ("Countdown",),
        threshold: float = 1.0,
        num_samples: int = 16,
        ks: Sequence[int] = (1, 16),
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 256,
        seed: int = 0,
        batch_size: int = 256,
        every: int = 1,
        chat: bool = False,
        group_size: int | None = None,
        baseline: str | None = None,
        num_logged: int = 3,
    ) -> None:
        """
        Args:
            sets: named problems; by default those of the data, by its `eval_problems()`.
            rewards: what judges a completion, as for GRPO.
            threshold: a completion is right if its rewards sum up to this.
            num_samples: n, completions of each problem.
            ks: budgets to report, at most num_samples.
            temperature: of sampling; 0 is greedy.
            top_p: mass of the likeliest tokens that are sampled from.
            max_new_tokens: length limit of a completion.
            seed: of the sampling streams.
            batch_size: completions sampled side by side.
            every: evaluate at every n-th validation run, before training and at its end. The others
                log NaN, so that no older number passes for theirs: a checkpoint that monitors one
                is not replaced by them, and early stopping by one is refused.
            chat: make text prompts a user's turn of the tokenizer's chat template.
            group_size: G of the RL stage, at most num_samples; num_samples by default.
            baseline: completions/*.parquet of the base model's evaluation.
            num_logged: samples to show at the end.

        Raises:
            ValueError: a k or group_size outside 1 to num_samples, or a count below 1.
        """
        self.settings = Settings(
            num_samples, threshold, temperature, top_p, max_new_tokens, chat, seed, batch_size
        )
        self.group_size = num_samples if group_size is None else group_size
        if not ks or not all(1 <= k <= num_samples for k in (*ks, self.group_size)):
            raise ValueError(
                "GenerationEval.ks and group_size must lie between 1 and num_samples="
                f"{num_samples}, got {list(ks)} and {self.group_size}: change one of them."
            )
        if every < 1 or num_logged < 0:
            raise ValueError(
                f"GenerationEval needs every of at least 1 and num_logged of at least 0, got "
                f"{every} and {num_logged}: raise them."
            )
        self.sets, self.rewards, self.ks = sets, rewards, tuple(ks)
        self.every, self.baseline, self.num_logged = every, baseline, num_logged
        self.history: list[dict[str, float]] = []
        self.completions: list[Row] = []
        self._sampler: Sampler | None = None
        self._base: Solved = {}
        self._validations = 0
        self._loaded_step = 0
        self._skipped: int | None = None
        """Step in the log of the last validation, if that was skipped."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Loads everything, so that what is wrong is refused before training."""
        sets = self._load(trainer)
        if stage == "fit":
            self._check_stopping(trainer, sets)
        self.teardown(trainer, pl_module, stage)
        self._sampler = Sampler(self.settings, self.rewards, sets, pl_module)
        if self.baseline is not None:
            self._base = read_solved(self.baseline, sets, self.settings.shared, self.group_size)

    def _load(self, trainer: Trainer) -> dict[str, list[Problem]]:
        if self.sets is not None:
            found = {name: problems.load() for name, problems in self.sets.items()}
        else:
            data = trainer.datamodule  # type: ignore[attr-defined]
            if not hasattr(data, "eval_problems"):
                raise ValueError(
                    "GenerationEval needs sets, or data with eval_problems() such as "
                    "CountdownData: set GenerationEval.sets, or drop it."
                )
            found = data.eval_problems()
        if not found or not all(found.values()):
            raise ValueError("GenerationEval has no problems: give every set some.")
        return found

    def _check_stopping(self, trainer: Trainer, sets: Iterable[str]) -> None:
        ours = re.compile(f"val/({'|'.join(map(re.escape, sets))})/({_MEASURES})")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            stops = self.every > 1 and isinstance(callback, EarlyStopping)
            if stops and ours.fullmatch(str(callback.monitor)):
                raise ValueError(
                    f"GenerationEval.every={self.every} leaves validations without "
                    f"{callback.monitor}, which EarlyStopping monitors: set every to 1, or monitor "
                    "what every validation measures, such as its nll."
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation or trainer.val_dataloaders == []:
            raise ValueError(
                "GenerationEval runs at validation, and this run has none: give data.val, and "
                "leave trainer.limit_val_batches above 0."
            )
        self._skipped = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "")

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "validations": self._validations, "base": self._base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self._validations = state_dict["history"], state_dict["validations"]
        if self.baseline is None:
            self._base = state_dict["base"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        training = trainer.state.fn == TrainerFn.FITTING
        if training and not trainer.sanity_checking:
            self._validations += 1
            if self._validations % self.every and not training_ends(trainer):
                self._skipped = trainer.fit_loop.epoch_loop._batches_that_stepped
                # Else reports and checkpoints go on to read the last numbers as if they were new.
                known = self.history[-1] if self.history else {}
                pl_module.log_dict({key: math.nan for key in known if key != "step"})
                return
            self._skipped = None
        pl_module.log_dict(self._record(trainer, pl_module))

    on_test_epoch_end = on_validation_epoch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes up for a skipped validation that was the last, as something stopped there."""
        if self._skipped is None:
            return
        step = max(self._skipped, trainer.fit_loop.epoch_loop._batches_that_stepped - 1)
        metrics = self._record(trainer, pl_module)
        trainer.callback_metrics.update({key: torch.tensor(x) for key, x in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)

    def _record(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Evaluates, and keeps the samples; returns the metrics."""
        training = trainer.state.fn == TrainerFn.FITTING
        step = trainer.global_step if training else self._loaded_step
        rows, metrics = self.evaluate(trainer, pl_module)
        self.history.append({"step": step, **metrics})
        if training and step == 0 and not self._base:
            self._base = solved(rows)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder, kind = Path(trainer.default_root_dir), "step" if training else "validate"
            write(folder / "completions", kind, step, rows, self.settings.shared)
        for logger in trainer.loggers:
            if hasattr(logger, "log_table") and self.completions:
                data = [list(row.values()) for row in self.completions]
                logger.log_table("completions", columns=list(self.completions[0]), data=data)
        return metrics

    def evaluate(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> tuple[list[Row], dict[str, float]]:
        """All samples and the metrics of all sets, the same on every rank."""
        assert self._sampler is not None, "setup comes first"
        rows: list[Row] = []
        metrics: dict[str, float] = {}
        model: Any = pl_module.model
        if isinstance(pl_module, PolicyModule):
            model = pl_module.policy.whole().model
        for name in self._sampler.sets:
            sampled = self._sampler.sample(name, model, pl_module, trainer)
            measured = self._measured(sampled)
            metrics |= {f"val/{name}/{key}": value for key, value in measured.items()}
            rows += sampled
        first = rows[:: self.settings.num_samples]
        shown = min(self.num_logged, len(first))
        self.completions = [first[i * len(first) // shown] for i in range(shown)]
        return rows, metrics

    def _measured(self, rows: list[Row]) -> dict[str, float]:
        """The metrics of one set from its samples."""
        n, g = self.settings.num_samples, self.group_size
        groups = [rows[i : i + n] for i in range(0, len(rows), n)]

        def column(name: str) -> list[list[Any]]:
            return [[row[name] for row in group] for group in groups]

        correct = torch.tensor(column("correct"))
        found: dict[str, ProblemMean] = {}

        def add(key: str, metric: ProblemMean, *given: Any) -> None:
            metric.update(*given)
            found[key] = metric

        alone = {"sync_on_compute": False}  # every rank holds all samples
        for k in self.ks:
            add(f"pass@{k}", PassAtK(k, **alone), correct)
        add(f"avg@{n}", AvgAtN(**alone), correct)
        if self._sampler is not None and self._sampler.answer is not None:
            add(f"maj@{n}", MajAtN(**alone), column("answer"), correct)
        add("truncated", TruncationRate(**alone), torch.tensor(column("truncated")))
        add("distinct", DistinctSolutions(**alone), column("completion"), correct)
        measured = {key: metric.compute().item() for key, metric in found.items()}
        measured |= {f"{key}_se": x.standard_error().item() for key, x in found.items()}
        measured["not_scorable"] = sum(math.isnan(row["reward"]) for row in rows) / len(rows)

        covered = pass_at_k(n, correct.sum(1), g)
        measured[f"coverage@{g}"] = covered.mean().item()
        counts = [self._base.get(x[0]["set"], {}).get(x[0]["prompt"], (0, 0)) for x in groups]
        if all(drawn >= g for drawn, _ in counts):
            drawn, right = torch.tensor(counts).T
            by_base = pass_at_k(drawn, right, g)
            if by_base.sum() > 0:
                kept = (by_base * covered).sum() / by_base.sum()
                measured[f"coverage_kept@{g}"] = kept.item()
        return measured
