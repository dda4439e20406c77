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

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_only
from peft import PeftModel
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch, collate
from gift_lightning.functional import IGNORED
from gift_lightning.head import ReferenceRows
from gift_lightning.models import embedded_path
from gift_lightning.modes import adapter_off, scoring
from gift_lightning.order import MicroBatch
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.references import (
    FrozenCopy,
    Reference,
    Samples,
    _projected,
    require_intact_base,
)
from gift_lightning.target import Distribution

_FORMAT = 1  # of the folder
_BYTES = 1 << 18  # about as much is hashed of each weight
_PAGE = 1 << 12  # bytes of each of about 4096 places in a weight file
# Of a model's config: what does not change its log-probabilities.
_NO_FUNCTION = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


class CachedTopK(Reference):
    """A reference read from disk: training runs no reference forward.

    The k most likely classes and the label have their exact probabilities; what is left, the tail,
    is spread evenly over all other classes. That distribution is off by at most 2 · tail in L1, and
    label log-probabilities are exact, so a step of GIFT is off by at most 2 · (1 − γ) · tail per
    token in the logits' gradient. Targets that read logarithms of single unlikely classes (reverse
    KL, TargetSFT without a `top_k` of at most k) see the tail's mean instead.

    Args:
        path: the cache's folder, made by `gift cache-reference`.
        k: most likely classes kept for each token; a token takes 8·k + 8 bytes.
        source: a teacher to cache, or a copy in another dtype; by default the policy before
            training, without adapters. Only its identity is looked at in training.
    """

    def __init__(self, path: str, k: int = 64, source: FrozenCopy | None = None) -> None:
        if k < 1:
            raise ValueError(f"reference CachedTopK: k is 1 or more, got {k}.")
        self.path = path
        self.k = k
        self.source = source
        self._cache: _Cache | None = None

    @property
    def cache(self) -> "_Cache":
        assert self._cache is not None, "setup comes first"
        return self._cache

    def setup(self, policy: Policy) -> None:
        """Opens the cache and reports its truncation error.

        Raises:
            ValueError: if there is none, it is damaged, or made from another model or with
                another k.
        """
        if self._cache is not None:
            return
        cache = _Cache(Path(self.path))
        meta, size = cache.meta, len(policy.head.weight)
        if meta.vocab_size != size:
            raise ValueError(
                f"the reference cache {self.path!r} has a vocabulary of {meta.vocab_size} "
                f"entries, the policy of {size}: a reference must share the policy's vocabulary."
            )
        if meta.k != self.k:
            raise _stale(self.path, [f"k ({meta.k} before, {self.k} now)"])
        model = _model_identity(policy, self.source)
        if not _same_model(meta.model, model):
            raise _stale(
                self.path, [f"the model ({_shown(meta.model)} before, {_shown(model)} now)"]
            )
        self._cache = cache
        cache.report()

    def check_data(self, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Samples]) -> None:
        """Refuses data that the cache was not made for, before any training.

        Args:
            tokenizer: the one that made the samples.
            sets: samples by the name of their set.

        Raises:
            ValueError: naming what changed since the cache was made.
        """
        meta = self.cache.meta
        changed = []
        if meta.tokenizer != _tokenizer_digest(tokenizer):
            changed.append("the tokenizer")
        if meta.template != _template_digest(tokenizer):
            changed.append("the chat template")
        for name, samples in sets.items():
            keys, _ = _keys(samples)
            missing = int((self.cache.find(keys) < 0).sum())
            if missing:
                changed.append(f"the data ({missing} of {len(keys)} {name} samples are not in it)")
        if changed:
            raise _stale(self.path, changed)

    def rows(self, policy: Policy, batch: Batch) -> ReferenceRows:
        """Reads the supervised tokens of the batch.

        Raises:
            ValueError: if a sample of the batch is not in the cache.
        """
        places = self.cache.places(_batch_keys(batch))
        labels = supervised_labels(batch)
        assert len(places) == len(labels), "a sample's key covers its labels"

        def read(name: str) -> Tensor:
            return torch.from_numpy(self.cache.arrays[name][places]).to(labels.device)

        return _CachedRows(
            labels,
            read("labels"),
            read("ids").long(),
            read("logp"),
            read("tail"),
            self.cache.meta.vocab_size,
        )

    def write(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        sets: Mapping[str, Samples],
        batch_size: int = 8,
        overwrite: bool = False,
    ) -> None:
        """Makes the cache at `path`, whole or not at all, in one pass on the policy's device.

        Samples are read in the order of the sets, each once, however often it occurs.

        Args:
            policy: as it was loaded.
            tokenizer: the one that made the samples.
            sets: samples by the name of their set: training and validation.
            batch_size: samples per forward pass.
            overwrite: replace a cache that is there.

        Raises:
            ValueError: if it is there already, cannot be written, or nothing is supervised; or if
                the adapters have changed the base.
        """
        final, vocab_size = Path(self.path).absolute(), len(policy.head.weight)
        _check_free(final, overwrite)
        if self.k > vocab_size:
            raise ValueError(
                f"reference CachedTopK: k={self.k} is more than the vocabulary of {vocab_size}."
            )
        if self.source is not None:
            self.source.setup(policy)
        else:
            require_intact_base(policy)
        samples: Any = ConcatDataset([cast(Any, s) for s in sets.values()])
        order, index = _layout(samples)
        total = int(index[order, 2].sum())
        if total == 0:
            raise ValueError("there is nothing to cache: no sample has a supervised token.")
        tmp = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        try:
            _make_folder(tmp, total * (8 * self.k + 8))
            by_key = order[np.argsort(index[order, 0])]
            np.save(tmp / "samples.npy", index[by_key], allow_pickle=False)
            arrays = {
                name: np.lib.format.open_memmap(tmp / f"{name}.npy", "w+", dtype, shape)
                for name, (dtype, shape) in _shapes(total, self.k).items()
            }
            parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
            for part in track(parts, "caching the reference"):
                examples = [samples[i] for i in part]
                whole = MicroBatch(tuple(part.tolist()), int(index[part, 2].sum()), len(part))
                batch = collate(examples, whole, pad_id=0)
                entries = index[batch["sample_ids"].numpy()]
                places = _ranges(entries[:, 1], entries[:, 2])
                for name, values in self._read(policy, batch).items():
                    arrays[name][places] = values.cpu().numpy()
            tail = np.exp(arrays["tail"], dtype=np.float64)
            for array in arrays.values():
                array.flush()
            meta = _Meta(
                model=_model_identity(policy, self.source),
                tokenizer=_tokenizer_digest(tokenizer),
                template=_template_digest(tokenizer),
                sets={name: len(s) for name, s in sets.items()},
                samples=len(order),
                tokens=total,
                k=self.k,
                vocab_size=vocab_size,
                mean_tail=float(tail.mean()),
                max_tail=float(tail.max()),
            )
            (tmp / "meta.json").write_text(json.dumps(asdict(meta), indent=2) + "\n")
            _publish(tmp, final)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)

    @torch.no_grad()
    def _read(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """The arrays' values at the supervised tokens of a batch."""
        device = policy.head.weight.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch = cast(Batch, moved)
        labels = supervised_labels(batch)
        if self.source is not None:
            rows = self.source.rows(policy, batch)
        else:
            off = adapter_off if isinstance(policy.model, PeftModel) else nullcontext
            with scoring(policy.model), off(policy.model):
                rows = _projected(policy, batch)
        size = max(64, 2**25 // len(policy.head.weight))
        chunks = [
            _truncate(Distribution(rows.logits(part), labels[part]), self.k)
            for part in (slice(i, i + size) for i in range(0, len(labels), size))
        ]
        return {name: torch.cat([c[name] for c in chunks]) for name in (chunks or [{}])[0]}


def _truncate(d: Distribution, k: int) -> dict[str, Tensor]:
    logp = d.logp
    top = logp.topk(k, -1)
    rest = logp.scatter(-1, top.indices, -math.inf).scatter_(-1, d.labels[:, None], -math.inf)
    # A sum over what is left: one minus what is kept would cancel.
    return {"labels": d.logp_y, "ids": top.indices, "logp": top.values, "tail": rest.logsumexp(-1)}


@dataclass(frozen=True)
class _CachedRows:
    """Truncated distributions of n tokens, made dense on demand."""

    labels: Int[Tensor, " n"]
    logp_y: Float[Tensor, " n"]
    ids: Int[Tensor, "n k"]
    logp: Float[Tensor, "n k"]
    tail: Float[Tensor, " n"]
    vocab_size: int

    def logits(self, rows: slice, out: Tensor | None = None) -> Float[Tensor, "c v"]:
        labels, ids = self.labels[rows, None], self.ids[rows]
        if out is None:
            out = self.logp.new_empty(len(ids), self.vocab_size)
        kept = ids.shape[1] + (ids != labels).all(-1).to(self.tail.dtype)
        others = (self.vocab_size - kept).clamp_min(1)
        out.copy_((self.tail[rows] - others.log())[:, None].expand_as(out))
        out.scatter_(-1, ids, self.logp[rows].to(out.dtype))
        return out.scatter_(-1, labels, self.logp_y[rows, None].to(out.dtype))


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


class _Cache:
    """An opened folder.

    Raises:
        ValueError: if it is no finished cache, damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "meta.json").is_file():
            found = "is no finished reference cache" if path.exists() else "does not exist"
            raise ValueError(f"the folder {str(path)!r} {found}: make one with `{_COMMAND}`.")
        try:
            meta = json.loads((path / "meta.json").read_text())
            version = meta["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged("meta.json", error) from error
        if version != _FORMAT:
            raise _stale(str(path), [f"the format ({version} before, {_FORMAT} now)"])
        names = [field.name for field in fields(_Meta)]
        if missing := [name for name in names if name not in meta]:
            raise self._damaged("meta.json", f"no {missing[0]!r}")
        self.meta = _Meta(**{name: meta[name] for name in names})
        self.index = self._open("samples", np.dtype(np.int64), (self.meta.samples, 3))
        keys, starts = self.index[:, 0], self.index[:, 1]
        ends = starts + self.index[:, 2]
        if (np.diff(keys) <= 0).any() or (starts < 0).any() or (ends > self.meta.tokens).any():
            raise self._damaged("samples.npy", "an entry is out of place")
        shapes = _shapes(self.meta.tokens, self.meta.k).items()
        self.arrays = {name: self._open(name, *shape) for name, shape in shapes}

    def _damaged(self, file: str, why: object) -> ValueError:
        return ValueError(
            f"the reference cache {str(self.path)!r} is damaged, {file}: {why}; make it again with "
            f"`{_COMMAND} --overwrite`."
        )

    def _open(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        file = f"{name}.npy"
        try:
            array = np.load(self.path / file, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(file, error) from error
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape} where {dtype} {shape} belongs"
            raise self._damaged(file, found)
        return cast(np.ndarray, array)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Which entry of `samples.npy` each key is, int64 [s]; -1 where it is not there."""
        column = self.index[:, 0]
        at = np.searchsorted(column, keys).clip(max=len(column) - 1)
        return np.where(column[at] == keys, at, -1)

    def places(self, keys: np.ndarray) -> np.ndarray:
        """The tokens of samples, one sample after the other, int64 [n]."""
        found = self.find(keys)
        if (found < 0).any():
            raise ValueError(
                f"the reference cache {str(self.path)!r} does not know {(found < 0).sum()} of "
                f"{len(keys)} samples of a batch: it holds the data that it was made from, and "
                "nothing else."
            )
        entries = self.index[found]
        return _ranges(entries[:, 1], entries[:, 2])

    @rank_zero_only
    def report(self) -> None:
        m = self.meta
        Console().print(
            f"Reference: top {m.k} of {m.vocab_size} classes of {_shown(m.model)}, cached "
            f"for {m.samples:,} samples, {m.tokens:,} tokens. Probability left out: "
            f"{m.mean_tail:.2g} on average, {m.max_tail:.2g} at most; twice that bounds the "
            "error of the distribution in L1.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


_COMMAND = "gift cache-reference --config ..."


def _stale(path: str, changed: list[str]) -> ValueError:
    have = "has" if len(changed) == 1 else "have"
    return ValueError(
        f"the reference cache {path!r} is stale: {' and '.join(changed)} {have} changed since it "
        f"was made; restore that, or make it again with `{_COMMAND} --overwrite`."
    )


def _shapes(tokens: int, k: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    single, integer = np.dtype(np.float32), np.dtype(np.int32)
    return {
        "labels": (single, (tokens,)),
        "ids": (integer, (tokens, k)),
        "logp": (single, (tokens, k)),
        "tail": (single, (tokens,)),
    }


def _layout(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The different samples in the order of their first place [s'], and `samples.npy` of all."""
    keys, counts = _keys(samples)
    order = np.sort(np.unique(keys, return_index=True)[1])
    starts = np.zeros_like(keys)
    starts[order] = np.cumsum(counts[order]) - counts[order]
    return order, np.stack([keys, starts, counts], 1)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + count - 1 of each sample, int64 [sum of counts]."""
    ends = np.cumsum(counts)
    first = np.repeat(starts - (ends - counts), counts)
    return first + np.arange(len(first))


# --- files ----------------------------------------------------------------------------------


def _check_free(final: Path, overwrite: bool) -> None:
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not (final / "meta.json").is_file():
        raise ValueError(f"{str(final)!r} exists and is no reference cache: give another path.")
    if not overwrite:
        raise ValueError(
            f"there is a reference cache at {str(final)!r} already: use it, give another path, or "
            "ask for --overwrite."
        )


def _make_folder(tmp: Path, size: int) -> None:
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


def _publish(tmp: Path, final: Path) -> None:
    for file in tmp.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    old = tmp.with_name(tmp.name + "-old")
    if final.exists():
        os.replace(final, old)
    os.replace(tmp, final)
    shutil.rmtree(old, ignore_errors=True)


# --- identity -------------------------------------------------------------------------------


def _key(input_ids: np.ndarray, labels: np.ndarray) -> int:
    """64 bits that name a sample; any two of a million share them with a probability of 3e-8."""
    labels = labels.astype("<i4")
    labels[:1] = IGNORED  # no token predicts the first
    content = input_ids.astype("<i4").tobytes() + labels.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _keys(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Key and number of supervised tokens of each sample, int64 [s] both."""
    keys, counts = np.zeros((2, len(samples)), dtype=np.int64)
    for i in range(len(samples)):
        input_ids, labels = (x.numpy() for x in samples[i])
        keys[i], counts[i] = _key(input_ids, labels), (labels[1:] != IGNORED).sum()
    return keys, counts


def _batch_keys(batch: Batch) -> np.ndarray:
    """Key of each sample of a batch, int64 [S], in the row-major order of its tokens."""
    tokens = torch.stack([batch["sequence_ids"], batch["input_ids"], batch["labels"]])
    sequence, input_ids, labels = tokens.flatten(1).cpu().numpy()
    real = sequence >= 0
    sequence, input_ids, labels = sequence[real], input_ids[real], labels[real]
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    assert (sequence[starts] == np.arange(len(starts))).all(), "samples appear in order, each whole"
    parts = (slice(i, j) for i, j in pairwise([*starts, len(sequence)]))
    return np.array([_key(input_ids[part], labels[part]) for part in parts], dtype=np.int64)


def _model_identity(policy: Policy, source: FrozenCopy | None) -> dict[str, str]:
    """What the reference is made from: its name, how it is loaded, and a hash of its weights."""
    loaded = "" if source is None else f"{source.dtype or ''}"
    if source is not None and source.pretrained is not None:
        weights = _file_digest(source.pretrained, source.gguf_file)
        return {
            "name": f"{source.pretrained}@{source.revision}".removesuffix("@None"),
            "loaded": f"{loaded} {source.gguf_file or ''}".strip(),
            "weights": weights,
        }
    name = str(policy.base.name_or_path or type(policy.base).__name__)
    return {"name": name, "loaded": loaded, "weights": _weight_digest(policy)}


def _same_model(a: dict[str, str], b: dict[str, str]) -> bool:
    # The same weights may lie in another folder; only without them must the name do.
    key = "weights" if a["weights"] and b["weights"] else "name"
    return (a[key], a["loaded"]) == (b[key], b["loaded"])


def _shown(model: dict[str, str]) -> str:
    details = [x for x in (model["loaded"], model["weights"][:8]) if x]
    return f"{model['name']} ({', '.join(details)})" if details else model["name"]


def _weight_digest(policy: Policy) -> str:
    """sha256 over config and weights of the policy without adapters; large weights are sampled."""
    config = policy.base.config.to_dict()
    function = {
        key: value
        for key, value in config.items()
        if key not in _NO_FUNCTION and not key.endswith(("_token_id", "dropout", "pdrop"))
    }
    digest = hashlib.sha256(json.dumps(function, sort_keys=True, default=str).encode())
    for name, value in sorted(_base_weights(policy), key=lambda item: item[0]):
        flat = value.detach().reshape(-1)
        # An odd stride meets every column of a matrix.
        stride = max(1, flat.numel() * flat.element_size() // _BYTES) | 1
        part = flat[::stride].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def _base_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers under the names that they have without adapters."""
    for name, value in policy.base.state_dict().items():
        path = name.split(".")
        adapter = any(p.startswith("lora_") or p == "modules_to_save" for p in path)
        if isinstance(value, Tensor) and not adapter:
            yield ".".join(p for p in path if p not in ("base_layer", "original_module")), value


def _file_digest(pretrained: str, gguf_file: str | None) -> str:
    """sha256 over samples of a folder's weight files; empty for what is no folder here."""
    folder = Path(embedded_path(pretrained))
    if not folder.is_dir():
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        wanted = file.suffix in (".safetensors", ".bin") or file.name == "config.json"
        if file.name == gguf_file if gguf_file else wanted:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as content:
                for start in range(0, size, max(_PAGE, size // 4096)):
                    content.seek(start)
                    digest.update(content.read(_PAGE))
    return digest.hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        state |= {"truncation": None, "padding": None}  # of the latest call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps([state, special], sort_keys=True).encode()).hexdigest()


def _template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()
