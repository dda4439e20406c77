"""A reference on disk: its most likely tokens, written by one offline pass and read ever after.

A cache is a folder of plain arrays, memory-mapped and never unpickled, and their description:

    meta.json      what it was made from, its sizes, and the probability mass that it leaves out
    samples.npy    int64 [s, 3]: key, first token, number of tokens; in ascending order of keys
    labels.npy     float32 [n]: log-probability of each supervised token
    ids.npy        int32 [n, k]: the k most likely classes
    logp.npy       float32 [n, k]: their log-probabilities
    tail.npy       float32 [n]: log of the mass outside those k and the label

Samples are found by a hash of their tokens and labels, not by their place in a dataset: training
and validation sets share one cache, order and packing do not matter, and a token can never be
given another token's row. Half precision would save a quarter of the space, and be wrong by up to
0.4% in the probability of an unlikely class (the spacing of float16 at 8 to 16 nats is 2⁻⁷).
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from gift_lightning import identity
from gift_lightning.collate import Batch, collate
from gift_lightning.distribution import Distribution, Peaks
from gift_lightning.head import ReferenceRows
from gift_lightning.matmul import chunks, default_chunk
from gift_lightning.models import require_intact_base
from gift_lightning.modes import adapter_off, has_adapters, scoring
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.references import FrozenCopy, Reference, Samples

_FORMAT = 1  # of the folder
_Values: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # of the arrays, in their order


class CachedTopK(Reference):
    """A reference read from disk: training runs no reference forward.

    The k most likely classes and the label have their exact probabilities; what is left, the tail,
    is spread evenly over all other classes. That distribution is off by at most 2 · tail in L1, and
    label log-probabilities are exact, so a step of GIFT is off by at most 2 · (1 − γ) · tail per
    token in the logits' gradient. Targets that read logarithms of single unlikely classes (reverse
    KL, TargetSFT without a `top_k` of at most k) see the tail's mean instead.

    Args:
        path: the cache's folder, made by `gift cache-reference`.
        k: most likely classes kept for each token, at most the vocabulary; a token takes 8·k + 8
            bytes.
        source: a teacher to cache, or a copy in another dtype; by default the policy before
            training, without adapters. Only its identity is looked at in training.
    """

    meta: "_Meta"  # these three from `setup` on
    index: np.ndarray
    arrays: dict[str, np.ndarray]

    def __init__(self, path: str, k: int = 64, source: FrozenCopy | None = None) -> None:
        if k < 1:
            raise ValueError(f"reference CachedTopK: k is 1 or more, got {k}.")
        self.path = path
        self.k = k
        self.source = source

    def setup(self, policy: Policy) -> None:
        """Opens the cache and reports its truncation error.

        Raises:
            ValueError: if it is missing, damaged, or made from another model or with another k.
        """
        if hasattr(self, "meta"):
            return
        meta, size = self._open(), len(policy.head.weight)
        if meta.vocab_size != size:
            raise ValueError(
                f"the reference cache {self.path!r} has a vocabulary of {meta.vocab_size} "
                f"entries, the policy of {size}: a reference must share the policy's vocabulary."
            )
        k = min(self.k, size)
        if meta.k != k:
            raise identity.stale(self.path, [f"k ({meta.k} before, {k} now)"])
        model = identity.model_identity(policy, self.source)
        if not identity.same_model(meta.model, model):
            before, now = identity.shown(meta.model), identity.shown(model)
            raise identity.stale(self.path, [f"the model ({before} before, {now} now)"])
        self.meta = meta
        meta.report()

    def _open(self) -> "_Meta":
        """Maps the arrays, and returns what describes them."""
        path = Path(self.path)
        if not (path / "meta.json").is_file():
            found = "is no finished reference cache" if path.exists() else "does not exist"
            raise ValueError(
                f"the folder {self.path!r} {found}: make one with `{identity.COMMAND}`."
            )
        try:
            values = json.loads((path / "meta.json").read_text())
            version = values["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise identity.damaged(self.path, "meta.json", error) from error
        if version != _FORMAT:
            raise identity.stale(self.path, [f"the format ({version} before, {_FORMAT} now)"])
        names = [field.name for field in fields(_Meta)]
        if missing := [name for name in names if name not in values]:
            raise identity.damaged(self.path, "meta.json", f"no {missing[0]!r}")
        meta = _Meta(**{name: values[name] for name in names})
        self.index = self._array("samples", np.dtype(np.int64), (meta.samples, 3))
        keys, starts, counts = self.index.T
        outside = (starts < 0) | (starts + counts > meta.tokens)
        if (np.diff(keys) <= 0).any() or outside.any():
            raise identity.damaged(self.path, "samples.npy", "an entry is out of place")
        shapes = _shapes(meta.tokens, meta.k).items()
        self.arrays = {name: self._array(name, *shape) for name, shape in shapes}
        return meta

    def _array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        file = f"{name}.npy"
        try:
            array = np.load(Path(self.path) / file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise identity.damaged(self.path, file, error) from error
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape} where {dtype} {shape} belongs"
            raise identity.damaged(self.path, file, found)
        return cast(np.ndarray, array)

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """Which entry of `samples.npy` each key is, int64 [s]; -1 where it is not there."""
        column = self.index[:, 0]
        at = np.searchsorted(column, keys).clip(max=len(column) - 1)
        return np.where(column[at] == keys, at, -1)

    def check_data(self, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Samples]) -> None:
        """Raises ValueError, before any training, for data that the cache was not made for."""
        changed = []
        if self.meta.tokenizer != identity.tokenizer_digest(tokenizer):
            changed.append("the tokenizer")
        if self.meta.template != identity.template_digest(tokenizer):
            changed.append("the chat template")
        for name, samples in sets.items():
            keys, _ = identity.sample_keys(samples)
            if missing := int((self._find(keys) < 0).sum()):
                changed.append(f"the data ({missing} of {len(keys)} {name} samples are not in it)")
        if changed:
            raise identity.stale(self.path, changed)

    def rows(self, policy: Policy, batch: Batch) -> ReferenceRows:
        """Raises ValueError if a sample of the batch is not in the cache."""
        found = self._find(identity.batch_keys(batch))
        if (found < 0).any():
            raise ValueError(
                f"the reference cache {self.path!r} does not know {(found < 0).sum()} of "
                f"{len(found)} samples of a batch: it holds the data that it was made from, and "
                "nothing else."
            )
        places, labels = _places(self.index[found]), supervised_labels(batch)
        assert len(places) == len(labels), "a sample's key covers its labels"
        arrays = self.arrays.values()
        read = [torch.from_numpy(array[places]).to(labels.device) for array in arrays]
        return CachedRows(labels, self.meta.vocab_size, *read)

    def write(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, Samples],
        batch_size: int = 8,
        overwrite: bool = False,
    ) -> None:
        """Makes the cache at `path`, whole or not at all, in one pass on the policy's device.

        The policy is as it was loaded. Samples are read in the order of the sets, each once,
        however often it occurs, and `batch_size` of them in a forward pass.

        Raises:
            ValueError: if it is there already, cannot be written, or nothing is supervised; or if
                the adapters have changed the base.
        """
        final, vocab_size = Path(self.path).absolute(), len(policy.head.weight)
        k = min(self.k, vocab_size)
        _check_free(final, overwrite)
        if self.source is not None:
            self.source.setup(policy)
            self.source.verify(packing=False)
        else:
            require_intact_base(policy.model, "reference FrozenCopy")
        samples: Any = ConcatDataset([cast(Any, s) for s in sets.values()])
        keys, counts = identity.sample_keys(samples)
        order = np.sort(np.unique(keys, return_index=True)[1])  # each sample's first place
        starts = np.zeros_like(keys)
        starts[order] = np.cumsum(counts[order]) - counts[order]
        index, total = np.stack([keys, starts, counts], 1), int(counts[order].sum())
        if total == 0:
            raise ValueError("there is nothing to cache: no sample has a supervised token.")
        with _new_folder(final, total * (8 * k + 8)) as folder:
            by_key = order[np.argsort(keys[order])]
            np.save(folder / "samples.npy", index[by_key], allow_pickle=False)
            arrays = {
                name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
                for name, (dtype, shape) in _shapes(total, k).items()
            }
            parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            for part in track(parts, "caching the reference"):
                whole = MicroBatch(tuple(part.tolist()), int(counts[part].sum()), len(part))
                batch = collate([samples[i] for i in part.tolist()], whole, pad_id=0, packing=False)
                places = _places(index[batch["sample_ids"].numpy()])
                for chunk, values in self._read(policy, batch, k):
                    for array, value in zip(arrays.values(), values, strict=True):
                        array[places[chunk]] = value.cpu().numpy()
            for array in arrays.values():
                array.flush()
            tail = np.exp(arrays["tail"], dtype=np.float64)
            meta = _Meta(
                model=identity.model_identity(policy, self.source),
                tokenizer=identity.tokenizer_digest(tokenizer),
                template=identity.template_digest(tokenizer),
                sets={name: len(s) for name, s in sets.items()},
                samples=len(order),
                tokens=total,
                k=k,
                vocab_size=vocab_size,
                mean_tail=float(tail.mean()),
                max_tail=float(tail.max()),
            )
            (folder / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n")

    def _read(self, policy: Policy, batch: Batch, k: int) -> Iterator[tuple[slice, _Values]]:
        """The arrays' values at the supervised tokens of a batch, chunk by chunk."""
        batch = move_data_to_device(batch, policy.head.weight.device)
        labels = supervised_labels(batch)
        if self.source is not None:
            rows = self.source.rows(policy, batch)
        else:
            off = adapter_off if has_adapters(policy.model) else nullcontext
            with scoring(policy.model), off(policy.model):
                rows = policy.projected(batch)
        for chunk in chunks(len(labels), default_chunk(policy.head.weight)):
            yield chunk, _truncate(Distribution(rows.logits(chunk), labels[chunk]), k)


def _truncate(d: Distribution, k: int) -> _Values:
    """`labels` [n], `ids` and `logp` [n, k] and `tail` [n], as in the folder."""
    top = d.logp.topk(k, -1)
    rest = d.logp.scatter(-1, top.indices, -math.inf).scatter_(-1, d.labels[:, None], -math.inf)
    # A sum over what is left: one minus what is kept would cancel.
    return d.logp_y, top.indices, top.values, rest.logsumexp(-1)


@dataclass(frozen=True)
class CachedRows:
    """Truncated distributions of n tokens."""

    labels: Int[Tensor, " n"]
    vocab_size: int
    logp_y: Float[Tensor, " n"]
    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]
    tail: Float[Tensor, " n"]

    def peaks(self, rows: slice, dtype: torch.dtype) -> Peaks:
        labels, ids = self.labels[rows, None], self.ids[rows].long()
        listed = (ids == labels).any(-1, keepdim=True)
        even = self._even(rows, listed).to(dtype).exp()
        above = self.logp[rows].to(dtype).exp() - even
        of_label = (self.logp_y[rows, None].to(dtype).exp() - even).masked_fill(listed, 0.0)
        ids, above = torch.cat([ids, labels], 1), torch.cat([above, of_label], 1)
        return Peaks(even, ids, above, self.vocab_size)

    def logits(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "c v"]:
        """Log-probabilities."""
        labels, ids = self.labels[rows, None], self.ids[rows].long()
        if out is None:
            out = self.logp.new_empty(len(ids), self.vocab_size)
        out.copy_(self._even(rows, (ids == labels).any(-1, keepdim=True)).expand_as(out))
        out.scatter_(-1, ids, self.logp[rows].to(out.dtype))
        return out.scatter_(-1, labels, self.logp_y[rows, None].to(out.dtype))

    def _even(self, rows: slice, listed: Bool[Tensor, "c 1"]) -> Float[Tensor, "c 1"]:
        """The log-probability of each class that is neither kept nor the label."""
        others = self.vocab_size - self.ids.shape[1] - (~listed).to(self.tail.dtype)
        return self.tail[rows, None] - others.clamp_min(1).log()


# --- the folder -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Meta:
    """What a cache was made from, its sizes, and the mass outside the top k and the label."""

    model: dict[str, str]
    tokenizer: str
    template: str
    sets: dict[str, int]
    samples: int
    tokens: int
    k: int
    vocab_size: int
    mean_tail: float
    max_tail: float
    format: int = _FORMAT

    @rank_zero_only
    def report(self) -> None:
        text = (
            f"Reference: top {self.k} of {self.vocab_size} classes of "
            f"{identity.shown(self.model)}, cached for {self.samples:,} samples, "
            f"{self.tokens:,} tokens. Probability left out: "
            f"{self.mean_tail:.2g} on average, {self.max_tail:.2g} at most; twice that bounds the "
            "error of the distribution in L1."
        )
        Console().print(text, highlight=False, markup=False, soft_wrap=True)


def _shapes(n: int, k: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    f, i = np.dtype(np.float32), np.dtype(np.int32)
    return {"labels": (f, (n,)), "ids": (i, (n, k)), "logp": (f, (n, k)), "tail": (f, (n,))}


def _places(entries: np.ndarray) -> np.ndarray:
    """start, ..., start + count - 1 of each entry of `samples.npy`, int64 [sum of counts]."""
    _, starts, counts = entries.T
    first = np.repeat(starts - (np.cumsum(counts) - counts), counts)
    return first + np.arange(len(first))


def _check_free(final: Path, overwrite: bool) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not (final / "meta.json").is_file():
        raise ValueError(f"{str(final)!r} exists and is no reference cache: give another path.")
    if not overwrite:
        raise ValueError(
            f"there is a reference cache at {str(final)!r} already: use it, give another path, or "
            "ask for `--overwrite true`."
        )


@contextmanager
def _new_folder(final: Path, size: int) -> Iterator[Path]:
    """A folder for `size` bytes that takes the place of `final` if all goes well."""
    tmp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    old = tmp.with_name(tmp.name + "-old")
    try:
        try:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        except OSError as error:
            raise ValueError(f"the reference cache cannot be written: {error}") from error
        free = shutil.disk_usage(tmp).free
        if size > free:  # a memory-mapped file would end the process when the disk is full
            raise ValueError(
                f"the reference cache needs {size / 1e9:.1f} GB at {str(tmp.parent)!r}, where "
                f"{free / 1e9:.1f} GB are free: choose a smaller k, or another path."
            )
        yield tmp
        for file in tmp.iterdir():
            with file.open("rb+") as handle:
                os.fsync(handle.fileno())
        if final.exists():
            os.replace(final, old)
        os.replace(tmp, final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
