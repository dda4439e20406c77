"""From samples to a batch of token rows, packed without changing what any sample sees."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from jaxtyping import Int
from torch import Tensor

from gift_lightning.functional import IGNORED
from gift_lightning.order import MicroBatch


class Batch(TypedDict):
    """One micro-batch: `r` rows of `t` tokens holding `s` samples.

    Samples that share a row are told apart by positions that restart at 0; padding at the end of a
    row is a document of its own. A model must be called with `position_ids`, without an attention
    mask and without a cache: it then builds the block-diagonal mask by itself.
    """

    input_ids: Int[Tensor, "r t"]
    position_ids: Int[Tensor, "r t"]
    labels: Int[Tensor, "r t"]
    """Not shifted; -100 is not learned, as is the first token of every sample."""
    sequence_ids: Int[Tensor, "r t"]
    """Which sample of the batch a token belongs to, in order of appearance; -1 for padding."""
    sample_ids: Int[Tensor, " s"]
    """Dataset index of each sample, in the order of `sequence_ids`."""
    step_tokens: int
    step_sequences: int
    """Learned tokens and samples of the whole optimizer step: all its micro-batches, all ranks."""


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit-decreasing: the item numbers of each row, at most `width` in sum per row."""
    rows: list[list[int]] = [[] for _ in lengths]
    free = [width] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next(r for r, space in enumerate(free) if space >= lengths[i])
        rows[row].append(i)
        free[row] -= lengths[i]
    return [row for row in rows if row]


def collate(
    examples: Sequence[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]],
    micro_batch: MicroBatch,
    pad_id: int,
    packing: bool = True,
) -> Batch:
    """Lay out samples in rows as long as the longest of them.

    Args:
        examples: `input_ids` and `labels` of each sample of `micro_batch`, in its order.
        micro_batch: What the samples are part of; without samples, the batch is one padding token.
        pad_id: Input at padding. Padding is known by position, so this may also be a real token.
        packing: Put several samples in a row if they fit; False keeps one per row.
    """
    assert len(examples) == len(micro_batch.sample_ids)
    lengths = [len(ids) for ids, _ in examples]
    width = max(lengths, default=1)
    rows = (pack(lengths, width) if packing else [[i] for i in range(len(examples))]) or [[]]
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    sequence_ids = torch.full(shape, -1)
    order: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for i in row:
            end = at + lengths[i]
            input_ids[r, at:end], labels[r, at:end] = examples[i]
            labels[r, at] = IGNORED
            position_ids[r, at:end] = torch.arange(lengths[i])
            sequence_ids[r, at:end] = len(order)
            order.append(i)
            at = end
        position_ids[r, at:] = torch.arange(width - at)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        labels=labels,
        sequence_ids=sequence_ids,
        sample_ids=torch.tensor([micro_batch.sample_ids[i] for i in order], dtype=torch.int64),
        step_tokens=micro_batch.step_tokens,
        step_sequences=micro_batch.step_sequences,
    )
