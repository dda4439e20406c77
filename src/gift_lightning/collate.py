"""From samples to a batch of token rows, packed without changing what any sample sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gift_lightning.functional import IGNORED
from gift_lightning.order import MicroBatch


class Batch(TypedDict):
    """One micro-batch: `r` rows of `t` tokens holding `s` samples.

    Samples that share a row are told apart by positions that restart at 0; padding at the end of a
    row is a document of its own. A model must be called with `position_ids` and without a cache: it
    then builds the block-diagonal mask by itself; where samples share a prompt, `reads` does.
    """

    input_ids: Int[Tensor, "r t"]
    position_ids: Int[Tensor, "r t"]
    document_ids: Int[Tensor, "r t"] | None
    """Which samples share a prompt, where any do: those of a document; -1 for padding."""
    labels: Int[Tensor, "r t"]
    """Not shifted; -100 is not learned, as is the first token of every sample."""
    sequence_ids: Int[Tensor, "r t"]
    """Which sample of the batch a token belongs to, in order of appearance; -1 for padding, and for
    a prompt that several share."""
    sample_ids: Int[Tensor, " s"]
    """Dataset index of each sample, in the order of `sequence_ids`."""
    step_tokens: int
    step_sequences: int
    """Learned tokens and samples of the whole optimizer step: all its micro-batches, all ranks."""


_SHARERS = 8  # samples that read a prompt once: more save little of it and attend over longer rows


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """First-fit-decreasing: the item numbers of each row, at most `width` in sum per row."""
    rows: list[list[int]] = [[] for _ in lengths]
    free = [width] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next(r for r, space in enumerate(free) if space >= lengths[i])
        rows[row].append(i)
        free[row] -= lengths[i]
    return [row for row in rows if row]


@dataclass
class _Document:
    """Samples that begin with the same `shared` tokens, which then stand in a row once."""

    samples: list[int]
    length: int
    shared: int = 0


def _documents(
    examples: Sequence[tuple[Tensor, Tensor]], prompts: Sequence[int] | None
) -> list[_Document]:
    lengths = [len(ids) for ids, _ in examples]
    if prompts is None:
        return [_Document([i], n) for i, n in enumerate(lengths)]
    limit, documents = 4 * max(lengths, default=0), []
    latest: dict[bytes, _Document] = {}
    for i, ((ids, _), prompt) in enumerate(zip(examples, prompts, strict=True)):
        # The prompt's last token predicts each completion's first, so every sample has its own.
        own, key = lengths[i] - prompt + 1, ids[:prompt].numpy().tobytes()
        document = latest.get(key) if prompt > 1 else None
        if document and len(document.samples) < _SHARERS and document.length + own <= limit:
            document.length += own
            document.samples.append(i)
            document.shared = prompt - 1
        else:
            latest[key] = _Document([i], lengths[i])
            documents.append(latest[key])
    return documents


def collate(
    examples: Sequence[tuple[Int[Tensor, " _"], Int[Tensor, " _"]]],
    micro_batch: MicroBatch,
    pad_id: int,
    packing: bool = True,
    prompts: Sequence[int] | None = None,
) -> Batch:
    """Lay out samples in rows as long as the longest of them, or of those that share a prompt.

    Args:
        examples: `input_ids` and `labels` of each sample of `micro_batch`, in its order.
        micro_batch: What the samples are part of; without samples, the batch is one padding token.
        pad_id: Input at padding. Padding is known by position, so this may also be a real token.
        packing: Put several samples in a row if they fit; False keeps one per row.
        prompts: Tokens of each sample's prompt, none of them learned: samples with the same one
            read it once, up to eight and up to four times the longest sample in a row.
    """
    assert len(examples) == len(micro_batch.sample_ids)
    documents = _documents(examples, prompts)
    lengths = [document.length for document in documents]
    width = max(lengths, default=1)
    rows = (pack(lengths, width) if packing else [[i] for i in range(len(lengths))]) or [[]]
    shape = (len(rows), width)
    input_ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORED)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    sequence_ids = torch.full(shape, -1)
    document_ids = torch.full(shape, -1)
    order: list[int] = []
    for r, row in enumerate(rows):
        at = 0
        for d in row:
            document = documents[d]
            document_ids[r, at : at + document.length] = d
            first = document.shared
            input_ids[r, at : at + first] = examples[document.samples[0]][0][:first]
            position_ids[r, at : at + first] = torch.arange(first)
            at += first
            for i in document.samples:
                ids, own = examples[i]
                end = at + len(ids) - first
                input_ids[r, at:end], labels[r, at:end] = ids[first:], own[first:]
                labels[r, at] = IGNORED
                position_ids[r, at:end] = torch.arange(first, len(ids))
                sequence_ids[r, at:end] = len(order)
                order.append(i)
                at = end
        position_ids[r, at:] = torch.arange(width - at)
    shared = len(documents) < len(examples)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        document_ids=document_ids if shared else None,
        labels=labels,
        sequence_ids=sequence_ids,
        sample_ids=torch.tensor([micro_batch.sample_ids[i] for i in order], dtype=torch.int64),
        step_tokens=micro_batch.step_tokens,
        step_sequences=micro_batch.step_sequences,
    )


def reads(batch: Batch) -> Bool[Tensor, "r t t"] | None:
    """Which tokens each token reads, where samples share a prompt: the earlier ones of its sample,
    and of what the samples of its document share."""
    documents, sequences = batch["document_ids"], batch["sequence_ids"]
    if documents is None:
        return None
    own = (sequences[:, :, None] == sequences[:, None]).logical_or_(sequences[:, None] == -1)
    return own.logical_and_(documents[:, :, None] == documents[:, None]).tril_()
