"""What a cached reference was made from: digests of samples, weights, tokenizer and template."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gift_lightning.collate import Batch
from gift_lightning.functional import IGNORED
from gift_lightning.models import embedded_path
from gift_lightning.policy import Policy
from gift_lightning.references import FrozenCopy, Samples

COMMAND = "gift cache-reference"
_BYTES = 1 << 18  # about as much is hashed of each weight
_PAGE = 1 << 12  # bytes of each of about 4096 places in a weight file
# Of a model's config: what does not change its log-probabilities.
_NO_FUNCTION = ("transformers_version", "_name_or_path", "dtype", "architectures", "use_cache")


def stale(path: str, changed: list[str]) -> ValueError:
    """The error that names what has changed since a cache was made."""
    have = "has" if len(changed) == 1 else "have"
    return ValueError(
        f"the reference cache {path!r} is stale: {' and '.join(changed)} {have} changed since it "
        f"was made; restore that, or make it again with `{COMMAND} --overwrite true`."
    )


def damaged(path: str, file: str, why: object) -> ValueError:
    return ValueError(
        f"the reference cache {path!r} is damaged, {file}: {why}; make it again with "
        f"`{COMMAND} --overwrite true`."
    )


# --- samples --------------------------------------------------------------------------------


def _key(input_ids: np.ndarray, labels: np.ndarray) -> int:
    """64 bits that name a sample; any two of a million share them with a probability of 3e-8."""
    labels = labels.astype("<i4")
    labels[:1] = IGNORED  # no token predicts the first
    content = input_ids.astype("<i4").tobytes() + labels.tobytes()
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sample_keys(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Key and number of supervised tokens of each sample, int64 [s] both."""
    keys, counts = np.zeros((2, len(samples)), dtype=np.int64)
    for i in range(len(samples)):
        input_ids, labels = (x.numpy() for x in samples[i])
        keys[i], counts[i] = _key(input_ids, labels), (labels[1:] != IGNORED).sum()
    return keys, counts


def batch_keys(batch: Batch) -> np.ndarray:
    """Key of each sample of a batch, int64 [S], in the row-major order of its tokens."""
    tokens = torch.stack([batch["sequence_ids"], batch["input_ids"], batch["labels"]])
    tokens = tokens.flatten(1)
    sequence, input_ids, labels = tokens[:, tokens[0] >= 0].cpu().numpy()
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    assert (sequence[starts] == np.arange(len(starts))).all(), "samples appear in order, each whole"
    parts = (slice(i, j) for i, j in pairwise([*starts, len(sequence)]))
    return np.array([_key(input_ids[part], labels[part]) for part in parts], dtype=np.int64)


# --- the model ------------------------------------------------------------------------------


def model_identity(policy: Policy, source: FrozenCopy | None) -> dict[str, str]:
    """Name of the reference's model, how it is loaded, and a hash of its weights."""
    loaded = "" if source is None else f"{source.dtype or ''}"
    if source is None or source.pretrained is None:
        name = str(policy.base.name_or_path or type(policy.base).__name__)
        return {"name": name, "loaded": loaded, "weights": _weight_digest(policy)}
    return {
        "name": f"{source.pretrained}@{source.revision}".removesuffix("@None"),
        "loaded": f"{loaded} {source.gguf_file or ''}".strip(),
        "weights": _file_digest(source.pretrained, source.gguf_file),
    }


def same_model(a: dict[str, str], b: dict[str, str]) -> bool:
    # The same weights may lie in another folder; only without them must the name do.
    key = "weights" if a["weights"] and b["weights"] else "name"
    return (a[key], a["loaded"]) == (b[key], b["loaded"])


def shown(model: dict[str, str]) -> str:
    details = [x for x in (model["loaded"], model["weights"][:8]) if x]
    return f"{model['name']} ({', '.join(details)})" if details else model["name"]


def _weight_digest(policy: Policy) -> str:
    """sha256 over config and weights of the policy without adapters; large weights are sampled."""
    function = {
        key: value
        for key, value in policy.base.config.to_dict().items()
        if key not in _NO_FUNCTION and not key.endswith(("_token_id", "dropout", "pdrop"))
    }
    digest = hashlib.sha256(json.dumps(function, sort_keys=True, default=str).encode())
    weights = {
        ".".join(p for p in path if p not in ("base_layer", "original_module")): value
        for path, value in ((name.split("."), v) for name, v in policy.base.state_dict().items())
        if isinstance(value, Tensor)
        and not any(p.startswith("lora_") or p == "modules_to_save" for p in path)
    }  # under the names that they have without adapters
    for name, value in sorted(weights.items()):
        flat = value.detach().reshape(-1)
        # An odd stride meets every column of a matrix.
        stride = max(1, flat.numel() * flat.element_size() // _BYTES) | 1
        part = flat[::stride].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


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


# --- the tokenizer --------------------------------------------------------------------------


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    if backend is not None:
        state |= {"truncation": None, "padding": None}  # of the latest call
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _digest([state, special])


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return _digest(tokenizer.chat_template)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
