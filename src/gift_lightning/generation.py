"""Batched sampling with a key-value cache and keyed randomness, in plain torch.

Every (seed, prompt, sample) has its own stream of uniform numbers, drawn before the first token; a
token is the inverse of the cumulative distribution at the next of them. What a sequence becomes
therefore does not depend on which others are decoded beside it, on the batch size or on the rank
(up to rounding of the logits, of the order of 1e-6 per token).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gift_lightning.kvcache import keep, roomy_cache
from gift_lightning.models import base_model
from gift_lightning.modes import sampling
from gift_lightning.seeds import keyed_seed


@dataclass(frozen=True)
class Completion:
    """One sampled sequence.

    tokens: with the end token, if one was drawn.
    logprobs: of each token under ``log_softmax(logits / temperature)`` (temperature 0 is scored at
        1), before top-p.
    finished: whether an end token was drawn; otherwise the length limit cut it.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    num_samples: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_ids: Sequence[int],
    pad_id: int,
    seed: int,
    batch_size: int = 256,
    keys: Sequence[int] | None = None,
) -> list[list[Completion]]:
    """`num_samples` completions of each prompt, in their order; the model's modes are restored.

    Args:
        prompts: token ids; of any lengths, none empty.
        temperature: 0 is greedy.
        batch_size: sequences decoded side by side; prompts of similar length are put together.
        keys: what names each prompt in its random streams; by default its place in `prompts`. Ranks
            that share the prompts of one list pass the places in that list.

    Raises:
        ValueError: an empty prompt, a negative temperature, or top_p outside (0, 1].
        FloatingPointError: the model gives NaN.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}: "
            "change them."
        )
    if not all(prompts):
        raise ValueError(
            f"prompt {[bool(p) for p in prompts].index(False)} is empty: give every prompt a token."
        )
    keys = range(len(prompts)) if keys is None else keys
    # By length, so that little padding is computed; the sort is stable.
    rows = [
        (p, k)
        for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p]))
        for k in range(num_samples)
    ]
    results: list[list[Completion | None]] = [[None] * num_samples for _ in prompts]
    with sampling(model):
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            uniforms = torch.stack(
                [
                    _uniforms(keyed_seed(seed, "sample", keys[p], k), max_new_tokens)
                    for p, k in chunk
                ]
            ).to(model.device, _precision(model.device))
            needed = sorted({p for p, _ in chunk})
            place = {p: i for i, p in enumerate(needed)}
            done = _decode(
                model,
                [prompts[p] for p in needed],
                torch.tensor([place[p] for p, _ in chunk], device=model.device),
                uniforms,
                temperature,
                top_p,
                frozenset(eos_ids),
                pad_id,
            )
            for (p, k), completion in zip(chunk, done, strict=True):
                results[p][k] = completion
    return results  # type: ignore[return-value]


def _uniforms(seed: int, n: int) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def _decode(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    prompt_of: Int[Tensor, " rows"],
    uniforms: Float[Tensor, "rows steps"],
    temperature: float,
    top_p: float,
    eos_ids: frozenset[int],
    pad_id: int,
) -> list[Completion]:
    """One batch: each prompt is read once, its cache is handed to every row that continues it."""
    device, count, steps = model.device, *uniforms.shape
    longest = max(map(len, prompts))
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.tensor([[pad_id] * (longest - len(p)) + list(p) for p in prompts], device=device)
    # No mask at all where nothing is padded: attention is faster without.
    mask = torch.arange(longest, device=device) >= longest - lengths[:, None]
    padded = not bool(mask.all())
    cache = roomy_cache(model.config, longest + steps - 1)
    takes = inspect.signature(base_model(model).forward).parameters
    kept_in = {
        "cache" if "cache" in takes else "past_key_values": cache
    }  # its name until transformers 5.23
    logits = model(
        input_ids=ids,
        attention_mask=mask.long() if padded else None,
        position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
        **kept_in,
    ).logits[prompt_of, -1]
    cache.reorder_cache(prompt_of)  # type: ignore[arg-type]
    mask, positions = mask[prompt_of], lengths[prompt_of]

    ends = torch.tensor(sorted(eos_ids), device=device)
    tokens = torch.full((count, steps), pad_id, dtype=torch.long, device=device)
    logprobs = torch.zeros(count, steps, device=device)
    rows = torch.arange(count, device=device)  # which sequence each row of the batch decodes
    for step in range(steps):
        drawn = draw(logits, uniforms[rows, step], temperature, top_p)
        scores = torch.log_softmax(logits.float() / (temperature or 1.0), -1)
        tokens[rows, step] = drawn
        logprobs[rows, step] = scores.gather(1, drawn[:, None])[:, 0]
        going = ~torch.isin(drawn, ends)
        if step == steps - 1 or not going.any():
            break
        if not going.all():
            kept = keep(cache, going)
            rows, drawn, mask, positions = rows[kept], drawn[kept], mask[kept], positions[kept]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
        logits = model(
            input_ids=drawn[:, None],
            attention_mask=mask.long() if padded else None,
            position_ids=positions[:, None] + step,
            use_cache=True,
            **kept_in,
        ).logits[:, -1]
    if logprobs.isnan().any():
        raise FloatingPointError(
            "The model's logits are NaN: its weights or its inputs are broken."
        )
    return [
        _completion(t, s, eos_ids) for t, s in zip(tokens.tolist(), logprobs.tolist(), strict=True)
    ]


def draw(
    logits: Float[Tensor, "rows vocab"],
    uniform: Float[Tensor, " rows"],
    temperature: float,
    top_p: float,
) -> Int[Tensor, " rows"]:
    """Tokens by inversion: the first whose cumulative probability exceeds the uniform number.

    Args:
        logits: unnormalised log-probabilities; -inf is never drawn.
        uniform: in [0, 1).
        temperature: divides the logits; 0 takes the largest.
        top_p: keeps the likeliest tokens, up to the one with which their mass reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.to(_precision(logits.device)) / temperature, -1)
    if top_p < 1:
        ordered, order = torch.sort(probabilities, dim=-1, descending=True, stable=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
        probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    chosen = torch.searchsorted(cumulative, uniform[:, None].to(total) * total, right=True)
    # Rounding can push the product up to the total: never go past the last token that has mass.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(chosen, last).clamp(max=logits.shape[-1] - 1)[:, 0]  # NaN is past the end


def _completion(tokens: list[int], logprobs: list[float], eos_ids: frozenset[int]) -> Completion:
    end = next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), None)
    return Completion(tokens[:end], logprobs[:end], end is not None)
