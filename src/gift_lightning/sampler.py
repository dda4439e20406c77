"""Completions of problems, drawn from a model and judged by rewards."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from gift_lightning.completions import Row
from gift_lightning.generation import Completion
from gift_lightning.problems import Problem, check_columns, prompt_text, prompt_tokens
from gift_lightning.replicas import Replicas
from gift_lightning.rewards import build_rewards, needs
from gift_lightning.rollouts import HFRollout, Sampling
from gift_lightning.seeds import keyed_seed
from gift_lightning.workers import Request, RewardPool


@dataclass(frozen=True)
class Settings:
    """How an evaluation draws and judges; `GenerationEval` explains each."""

    num_samples: int
    threshold: float
    temperature: float
    top_p: float
    max_new_tokens: int
    chat: bool
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(
                    f"GenerationEval.{name} must be at least 1, got {value}: raise it."
                )
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and math.isfinite(self.threshold)):
            raise ValueError(
                "GenerationEval needs a temperature of at least 0, a top_p in (0, 1] and a finite "
                f"threshold, got {self.temperature}, {self.top_p} and {self.threshold}."
            )

    @property
    def shared(self) -> dict[str, float]:
        """What two evaluations must have in common to be compared."""
        names = ("temperature", "top_p", "max_new_tokens", "chat", "threshold")
        return {name: getattr(self, name) for name in names}


class Sampler:
    """Draws and judges the completions of named problem sets.

    Args:
        rewards: what judges, as for GRPO.
        sets: the problems.
        module: with a `model` (a causal LM) and its `tokenizer`.

    Raises:
        ValueError: a reward cannot be built, cannot run here or lacks a column, or a prompt has no
            tokens or is too long for the model.
    """

    def __init__(
        self,
        settings: Settings,
        rewards: Sequence[str | dict[str, Any]],
        sets: Mapping[str, Sequence[Problem]],
        module: Any,
    ) -> None:
        self.settings, self.sets = settings, sets
        self.rewards = build_rewards(rewards)
        offered = (getattr(weighted.reward, "answer", None) for weighted in self.rewards)
        self.answer: Any = next(filter(callable, offered), None)
        for weighted in self.rewards:
            weighted.reward.check(settings.max_new_tokens)
        self._prompts: dict[str, list[list[int]]] = {}
        for name, problems in sets.items():
            for weighted in self.rewards:
                check_columns(weighted.name, problems, needs(weighted.reward))
            prompts = [prompt_tokens(module.tokenizer, p, settings.chat) for p in problems]
            check_positions(module.model, problems, prompts, settings.max_new_tokens)
            self._prompts[name] = prompts
        self._pool = RewardPool(self.rewards)  # last: it starts processes

    def sample(self, name: str, model: Any, module: Any, trainer: Trainer) -> list[Row]:
        """All samples of a set, in the order of its problems; each replica draws its share.

        Args:
            name: of the set.
            model: a causal LM, all of it.
            module: that it belongs to.
            trainer: the module's.
        """
        problems = self.sets[name]
        replicas = Replicas.of(trainer)
        mine = range(replicas.index, len(problems), replicas.number)
        rows: list[Row] = []
        requests: list[Request] = []
        for i, group in zip(mine, self._generate(name, mine, model, module.end_ids), strict=True):
            for completion in group:
                limit = self.settings.max_new_tokens
                asked = request(problems[i], completion, module.tokenizer, limit)
                requests.append(asked)
                rows.append({"set": name, "problem": i})
                rows[-1] |= {"prompt": prompt_text(problems[i].prompt)}
                rows[-1] |= {"completion": asked.completion, "truncated": not completion.finished}
                said = self.answer is not None and completion.finished
                text = asked.completion
                rows[-1]["answer"] = self.answer(text, **asked.columns) if said else None
        for row, scored in zip(rows, self._pool.score(requests), strict=True):
            row["reward"] = self._pool.total(scored)
            # Weights such as 0.7, 0.2 and 0.1 sum up to a little less than 1.
            enough = row["reward"] >= self.settings.threshold - 1e-9
            row["correct"] = enough and not row["truncated"]
        # The samples of a problem stay in their order.
        return sorted(chain.from_iterable(replicas.gathered(rows)), key=lambda x: x["problem"])

    def close(self) -> None:
        """Ends the reward workers."""
        self._pool.close()

    def _generate(
        self, name: str, places: Sequence[int], model: Any, ends: Sequence[int]
    ) -> list[list[Completion]]:
        """Completions of the problems at these places."""
        settings, engine = self.settings, HFRollout(self.settings.batch_size)
        engine.sync(model)
        return engine.generate(
            [self._prompts[name][i] for i in places],
            settings.num_samples,
            Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, tuple(ends)),
            seed=keyed_seed(settings.seed, "evaluation", name),
            keys=places,
        )


def check_positions(
    model: Any, problems: Sequence[Problem], prompts: Sequence[Sequence[int]], limit: int
) -> None:
    """Raises ValueError if a prompt and `limit` more tokens exceed the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", math.inf)
    for problem, ids in zip(problems, prompts, strict=True):
        if len(ids) + limit > positions:
            raise ValueError(
                f"the {len(ids)} prompt tokens of {problem.origin} and completions of up to "
                f"{limit} tokens exceed the model's {positions} positions: lower the length of "
                "completions, or leave such prompts out."
            )


def request(
    problem: Problem,
    completion: Completion,
    tokenizer: PreTrainedTokenizerBase,
    max_completion_length: int,
) -> Request:
    """What rewards are asked about a completion: its text, without the end token."""
    ids = completion.tokens[: -1 if completion.finished else None]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    columns = {**problem.columns, "prompt": problem.prompt}
    columns["max_completion_length"] = max_completion_length
    return Request(text, completion.tokens, columns)
