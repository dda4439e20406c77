"""The policy as files that vLLM reads: the base that it starts from, and every update."""

import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.models import base_model
from gift_lightning.modes import has_adapters

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM can make room for
_UNSERVED = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
)


class Handover:
    """Hands the policy over, each time in a folder of its own and under a name of its own.

    vLLM keeps what it has computed of a prompt, by the adapter's name among others, and would go on
    from what older weights computed (vllm-project/vllm#42125).

    Args:
        shared_folder: where; by default the machine's folder for temporary files.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, shared_folder: str | None) -> None:
        if shared_folder is not None and not Path(shared_folder).is_dir():
            raise ValueError(f"shared_folder {shared_folder!r} is no folder: create it.")
        self.shared_folder = shared_folder
        self.folder: Path | None = None
        self.name = ""
        self._run, self._version = "", 0

    @property
    def base(self) -> Path:
        assert self.folder is not None, "open comes first"
        return self.folder / "base"

    def open(self) -> None:
        folder = tempfile.mkdtemp(prefix="gift-vllm-", dir=self.shared_folder)
        self.folder = Path(folder).absolute()
        self._run, self._version, self.name = secrets.token_hex(8), 0, ""

    def write_base(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """The model without its adapters, as a Hugging Face folder."""
        _write(base_model(model), self.base)
        tokenizer.save_pretrained(str(self.base))

    def update(self, model: PreTrainedModel, load: Callable[[str, Path], None]) -> str:
        """Writes what training changes, the adapters or all weights; returns its name.

        Args:
            model: the policy.
            load: makes vLLM read it, given its name and folder.
        """
        assert self.folder is not None, "open comes first"
        self._version += 1
        before, name = self.name, f"{self._run}-{self._version}"
        folder = self.folder / name
        if has_adapters(model):
            # Without a look at the hub whether the embedding has grown.
            model.save_pretrained(
                str(folder), selected_adapters=["default"], save_embedding_layers=False
            )
        else:
            _write(model, folder)
        load(name, folder)
        if before:
            shutil.rmtree(self.folder / before)
        self.name = name
        return name

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None


def _write(base: PreTrainedModel, folder: Path) -> None:
    """The weights under their own names, with config, without adapters.

    On a CPU vLLM 0.32 packs the head's weights once, and loads none again that is tied to the
    embedding: there it is written, and served, as a head of its own.
    """
    state = {
        name.replace(".base_layer.", "."): value
        for name, value in base.state_dict().items()
        if ".lora_" not in name
    }
    head: Any = base.get_output_embeddings()
    is_tied = head.weight is base.get_input_embeddings().weight
    config, said = base.config, base.config.tie_word_embeddings
    if is_tied and not torch.cuda.is_available():
        name = next(name for name, module in base.named_modules() if module is head)
        state[f"{name}.weight"] = head.weight.detach().clone()
        config.tie_word_embeddings = False
    try:
        base.save_pretrained(str(folder), state_dict=state)
    finally:
        config.tie_word_embeddings = said


def check_adapters(model: PreTrainedModel) -> None:
    """Raises ValueError if vLLM would not serve the policy's adapters, or as something else."""
    if not has_adapters(model):
        return
    config: Any = model.peft_config["default"]
    for name in _UNSERVED:
        if getattr(config, name, None):
            raise ValueError(
                f"vLLM serves no adapters with {name}: drop it from model.model.lora, or sample "
                "with HFRollout."
            )
    if getattr(config, "bias", "none") != "none":
        raise ValueError(
            f"vLLM serves no adapters with bias {config.bias!r}: drop it from "
            "model.model.lora.extra, or sample with HFRollout."
        )
    if config.r > _RANKS[-1]:
        raise ValueError(
            f"vLLM serves adapters of rank {_RANKS[-1]} at most: lower model.model.lora.r, now "
            f"{config.r}."
        )


def max_lora_rank(model: PreTrainedModel) -> int | None:
    """What vLLM is told as such; None without adapters."""
    if not has_adapters(model):
        return None
    config: Any = model.peft_config["default"]
    return next(rank for rank in _RANKS if rank >= config.r)
