"""Rollout engines: what samples completions from the policy while it is trained."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.generation import Completion, generate


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Attributes:
        max_completion_length: most tokens of one, its end token counted.
        temperature: divides the logits; 0 is greedy.
        top_p: mass of the likeliest tokens that are sampled from.
        end_ids: tokens that end a completion.
    """

    max_completion_length: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    end_ids: tuple[int, ...] = ()


class RolloutEngine(ABC):
    """Samples completions of prompts, with the log-probability of every sampled token.

    Log-probabilities are those of ``log_softmax(logits / temperature)`` before top-p, as the
    trainer scores them.
    """

    is_the_policy: ClassVar[bool] = False
    """Whether the trainer's own model samples, so that there is no difference to correct."""

    def start(  # noqa: B027 (the policy itself is always ready)
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        max_prompt_length: int,
    ) -> None:
        """Gets ready to sample; called once, before training, on every rank.

        Args:
            model: the policy.
            tokenizer: its own.
            sampling: how completions will be drawn.
            max_prompt_length: tokens of the longest prompt.

        Raises:
            ValueError: this engine cannot sample so from this policy.
        """

    @abstractmethod
    def sync(self, model: PreTrainedModel) -> None:
        """Takes over the policy's weights; called before every rollout, on every rank."""

    def release(self) -> None:  # noqa: B027 (most engines have nothing to forget)
        """Called after every rollout: gives back the memory that it took."""

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        sampling: Sampling,
        *,
        seed: int,
        keys: Sequence[int],
    ) -> list[list[Completion]]:
        """`num_samples` completions of each prompt, in the prompts' order.

        Args:
            prompts: token ids.
            seed: of this rollout.
            keys: what names each prompt in its random streams; with the seed and the sample's
                number, all that a completion's randomness depends on.
        """

    def close(self) -> None:  # noqa: B027 (likewise)
        """Ends what `start` began; called after training and after an error, maybe twice."""


class HFRollout(RolloutEngine):
    """The policy itself, in this process: works for every model and device.

    Args:
        batch_size: completions decoded side by side.
    """

    is_the_policy = True

    def __init__(self, batch_size: int = 256) -> None:
        if batch_size < 1:
            raise ValueError(f"HFRollout.batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self._model: PreTrainedModel | None = None

    def sync(self, model: PreTrainedModel) -> None:
        self._model = model

    def release(self) -> None:
        self._model = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        sampling: Sampling,
        *,
        seed: int,
        keys: Sequence[int],
    ) -> list[list[Completion]]:
        assert self._model is not None, "sync comes first"
        return generate(
            self._model,
            prompts,
            num_samples,
            max_new_tokens=sampling.max_completion_length,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            eos_ids=sampling.end_ids,
            pad_id=sampling.end_ids[0] if sampling.end_ids else 0,
            seed=seed,
            batch_size=self.batch_size,
            keys=keys,
        )
