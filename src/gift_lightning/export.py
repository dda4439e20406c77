"""`gift export`: a checkpoint as a Hugging Face folder, which is loaded and compared at once."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from gift_lightning.card import model_card
from gift_lightning.cli import build_model
from gift_lightning.errors import CommandParser
from gift_lightning.models import base_model, for_export, require_intact_base
from gift_lightning.modes import has_adapters
from gift_lightning.module import PolicyModule
from gift_lightning.quantization import is_quantized, keep_layout, merged, unquantized
from gift_lightning.sharding import is_folder_of_shards, read_shards

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BASES = ["dequantized", "original"]
_SAMPLE = 16  # tokens of the greedy sample that must come out again


def main(words: Sequence[str]) -> None:
    """`gift export`."""
    parser = CommandParser(
        "gift export",
        description="Write a checkpoint of a run as a Hugging Face folder: safetensors, tokenizer, "
        "generation config and model card. It is loaded and compared before it stands there.",
    )
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="a run's folder")
    add("--out", required=True, metavar="DIR", help="a folder that is new or empty")
    add("--checkpoint", metavar="FILE", help="by default checkpoints/last.ckpt of the run")
    add("--merge", action="store_true", help="adapters into their base")
    add(
        "--base",
        choices=_BASES,
        help="of QLoRA, to merge into: the 4-bit weights that the adapters were trained on, made "
        "dense (default), or the weights before quantisation",
    )
    add("--dtype", choices=_DTYPES, help="of the weights; by default as they were trained")
    add("--max_shard_size", default="5GB", metavar="SIZE", help="of one file of weights")
    add(
        "--push-to-hub",
        "--push_to_hub",
        metavar="OWNER/NAME",
        help="upload it as well, with your own login",
    )
    given = parser.parse_args(list(words))
    run, out = Path(given.run), Path(given.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is not empty, name a new folder.")
    checkpoint = Path(given.checkpoint or run / "checkpoints" / "last.ckpt")
    module, ends = load(run, checkpoint)
    model = prepared(module.model, given.merge, given.dtype, given.base)
    with _whole(out) as part:
        module.export(str(part), model, ends, given.max_shard_size)
        base = given.merge and is_quantized(base_model(module.model)) and (given.base or _BASES[0])
        adapters = has_adapters(model)
        card = model_card(run, checkpoint.name, module.about, adapters, base or None)
        (part / "README.md").write_text(card, encoding="utf-8")
        check(model, part)
    print(f"Written to {out}; loaded again, logits and a greedy sample are the same.")
    if given.merge:
        change = difference(model, module.model)
        print(f"Merging moved the logits by up to {change:.2g} of the largest.")
    if given.push_to_hub:
        push(out, given.push_to_hub, model, given.max_shard_size)
        print(f"Uploaded to {given.push_to_hub}.")


def load(run: Path, checkpoint: Path) -> tuple[PolicyModule, list[int]]:
    """The module of a run with the weights of a checkpoint, and what ends a completion.

    Raises:
        ValueError: one of them is not there, or they are not of the same model.
    """
    if not (run / "config.yaml").is_file():
        raise ValueError(f"--run: {run} is no run, it has no config.yaml.")
    sharded = is_folder_of_shards(checkpoint)
    if not sharded and not checkpoint.is_file():
        raise ValueError(f"{checkpoint} is no file: give --checkpoint.")
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    module = build_model(config["model"])
    if sharded:
        return module.eval(), read_shards(checkpoint, module.state_dict())["end_ids"]
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    module.load_state_dict(state["state_dict"], strict=module.strict_loading)
    return module.eval(), state["end_ids"]


def prepared(
    model: PreTrainedModel, merge: bool, dtype: str | None, base: str | None = None
) -> PreTrainedModel:
    """The model as it will be written."""
    if merge and not has_adapters(model):
        raise ValueError("--merge: the run has trained no adapters, drop it.")
    if base and not (merge and is_quantized(base_model(model))):
        raise ValueError(f"--base {base} is for --merge after training on a quantised base.")
    if merge and has_adapters(model):
        onto = None
        if base == "original":
            require_intact_base(model, "--base dequantized")
            onto = unquantized(model)
        model = merged(model, onto, wide=dtype == "float32")
    else:
        model = for_export(model)
    if dtype and has_adapters(model):
        raise ValueError(f"--dtype {dtype}: adapters stay as they are, add --merge.")
    if dtype:
        for parameter in model.parameters():  # rotary tables stay as they are, as when it is loaded
            parameter.data = parameter.data.to(_DTYPES[dtype])
        model.config.dtype = _DTYPES[dtype]
    return model


@torch.no_grad()
def check(model: PreTrainedModel, folder: Path) -> None:
    """Raises RuntimeError unless what lies in the folder computes what the model does.

    Both attend in the same way, since another one rounds differently, and both end a sample where
    the folder says: training may have added ends to the model's own.
    """
    kind: Any = AutoPeftModelForCausalLM if has_adapters(model) else AutoModelForCausalLM
    quantized = {
        "quantization_config": getattr(model.config, "quantization_config", None),
        "device_map": {"": model.device},
    }
    again: Any = kind.from_pretrained(
        str(folder),
        dtype=model.dtype,
        attn_implementation=base_model(model).config._attn_implementation,
        trust_remote_code=False,
        **quantized,
    )
    keep_layout(again)
    ends = GenerationConfig.from_pretrained(str(folder)).eos_token_id
    found = [(_logits(one), _greedy(one, ends)) for one in (model.eval(), again.eval())]
    if not torch.equal(found[0][0], found[1][0]) or found[0][1] != found[1][1]:
        error = float((found[0][0] - found[1][0]).abs().max())
        raise RuntimeError(
            f"the folder was written, but its model computes something else (logits differ by "
            f"{error:.2g}): nothing was kept."
        )


@torch.no_grad()
def difference(model: PreTrainedModel, trained: PreTrainedModel) -> float:
    """Largest difference of the two models' logits, relative to the largest logit."""
    found, expected = (_logits(one.eval()).float() for one in (model, trained))
    return float((found - expected).abs().max() / expected.abs().max())


def _prompt(model: PreTrainedModel) -> Tensor:
    return torch.arange(1, 9, device=model.device)[None]


def _logits(model: PreTrainedModel) -> Tensor:
    """Of eight tokens."""
    found: Tensor = model(input_ids=_prompt(model), use_cache=False).logits
    return found


def _greedy(model: Any, ends: int | list[int] | None) -> list[int]:
    """How greedy sampling goes on from these tokens, up to one of the ends."""
    ids = _prompt(model)
    options = {"max_new_tokens": _SAMPLE, "do_sample": False, "eos_token_id": ends}
    sample: list[int] = model.generate(input_ids=ids, attention_mask=ids > 0, **options)[0].tolist()
    return sample


def push(folder: Path, name: str, model: PreTrainedModel, max_shard_size: str) -> None:
    """Uploads what lies in the folder, which `model` was written to."""
    cast(Any, model).push_to_hub(name, max_shard_size=max_shard_size)
    for part in AutoTokenizer, GenerationConfig:
        part.from_pretrained(str(folder)).push_to_hub(name)
    ModelCard.load(folder / "README.md").push_to_hub(name)


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` if all goes well, and is gone otherwise."""
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
