"""What one rollout brought: completions with their rewards and advantages, as training batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gift_lightning.collate import Batch, collate
from gift_lightning.functional import IGNORED
from gift_lightning.order import MicroBatch


@dataclass
class Experience:
    """The completions of one rollout, c in all, g for each prompt side by side.

    Token sequences lie end to end in flat tensors, so that a checkpoint holds plain tensors.
    """

    number: int
    """Of the rollout, counted over the run."""
    prompt_ids: Int[Tensor, " all_prompt_tokens"]
    prompt_lengths: Int[Tensor, " c"]
    """Tokens of each completion's prompt."""
    completion_ids: Int[Tensor, " all_tokens"]
    completion_lengths: Int[Tensor, " c"]
    sampler_logp: Float[Tensor, " all_tokens"]
    """Log-probability of each sampled token, as the engine gave it."""
    finished: Bool[Tensor, " c"]
    """Whether an end token was drawn; otherwise the length limit cut the completion."""
    rewards: Float[Tensor, " c"]
    """Weighted sums; NaN where not scorable."""
    advantages: Float[Tensor, " c"]
    counted: Bool[Tensor, " c"]
    """Whether the completion's tokens count in what the loss is divided by: all, or all but
    truncated ones."""
    trained: Bool[Tensor, " c"]
    """Whether they get a gradient at all; the others are never read by the policy."""
    problems: Int[Tensor, " p"]
    """Index of the problem of each group."""
    old_logp: Float[Tensor, " all_tokens"] | None = None
    """Log-probabilities under the policy that sampled, scored by the trainer; None while the first
    step's own are those."""
    demonstrations: Int[Tensor, " d"] | None = None
    """Indices of demonstrations to be trained with it, by a gate's decision."""
    demonstration_weights: Float[Tensor, " d"] | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    def lengths(self) -> Int[Tensor, " c"]:
        """Tokens of prompt and completion."""
        return self.prompt_lengths + self.completion_lengths

    def num_tokens(self, which: Bool[Tensor, " c"]) -> Int[Tensor, " c"]:
        """Sampled tokens of each completion of some, 0 for the others."""
        return torch.where(which, self.completion_lengths, 0)

    def batch(
        self, part: MicroBatch, pad_id: int, packing: bool, share_prompts: bool = False
    ) -> Batch:
        """The micro-batch of some completions, of which every sampled token is supervised."""
        prompts, completions = _split(self.prompt_ids, self.prompt_lengths), self.completions()
        examples = []
        for i in part.sample_ids:
            ids = torch.cat([prompts[i], completions[i]])
            labels = ids.clone()
            labels[: len(prompts[i])] = IGNORED
            examples.append((ids, labels))
        lengths = [len(prompts[i]) for i in part.sample_ids]
        return collate(examples, part, pad_id, packing, lengths if share_prompts else None)

    def completions(self) -> Sequence[Tensor]:
        return _split(self.completion_ids, self.completion_lengths)

    def sampled(self, ids: Int[Tensor, " k"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """The sampler's log-probabilities of some completions, and whose they are, of the k."""
        parts = _split(self.sampler_logp, self.completion_lengths)
        logp = torch.cat([self.sampler_logp[:0], *(parts[i] for i in ids.tolist())])
        return logp, torch.arange(len(ids)).repeat_interleave(self.completion_lengths[ids])

    def token_values(
        self, batch: Batch, values: Shaped[Tensor, " all_tokens"]
    ) -> Shaped[Tensor, " n"]:
        """Values of all completions' tokens, at the supervised tokens of a batch, in order."""
        parts = _split(values, self.completion_lengths)
        chosen = [parts[i] for i in batch["sample_ids"].tolist()]
        return torch.cat([values[:0], *chosen]).to(batch["labels"].device)

    def completion_values(self, batch: Batch, values: Float[Tensor, " c"]) -> Float[Tensor, " n"]:
        """Values of the completions, at each of their supervised tokens in a batch."""
        chosen = batch["sample_ids"].cpu()
        spread = values[chosen].repeat_interleave(self.completion_lengths[chosen])
        return spread.to(batch["labels"].device)


def flat(sequences: Sequence[Sequence[Any]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sequences end to end, and their lengths."""
    values = torch.tensor([x for sequence in sequences for x in sequence], dtype=dtype)
    return values, torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)


def _split(values: Tensor, lengths: Tensor) -> Sequence[Tensor]:
    return values.split(lengths.tolist())
