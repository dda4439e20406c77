"""Models that cannot be had as they are asked for: one sentence, and never random weights."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gift_lightning.models import Lora, causal_lm, tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(hidden_size=16, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, said: str) -> None:
    with pytest.raises(ValueError, match=f"'{folder}' cannot be loaded: give .*{said}") as caught:
        causal_lm(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [1, 3])
def test_weights_that_are_not_in_the_files(folder: Path, number: int) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in sorted(weights)[-number:]:
        del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    more = " and 2 more" if number == 3 else ""
    refused(folder, rf"its files have no model\.[\w.]+{more} of the right shape")


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    refused(folder, r"its files have no model\.[\w.]+ and 2 more of the right shape")


def test_half_a_file_of_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:4096])
    refused(folder, "header")


OWN = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}


@pytest.mark.parametrize("more", [{}, {"auto_map": OWN}], ids=["unknown", "its own code"])
def test_a_model_that_transformers_does_not_have(folder: Path, more: dict) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", **more}))
    (folder / "own.py").write_text("raise SystemExit('own code was run')\n")
    refused(folder, "custom code" if more else "model type `own`")


def test_attention_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"cannot be loaded: .*nonsense"):
        causal_lm("gift:countdown", attn_implementation="nonsense")


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        (Lora(target_modules=["nonsense"]), "nonsense"),
        (Lora(r=0), "`r`"),
        (Lora(extra={"nonsense": 1}), "nonsense"),
        (Lora(extra={"init_lora_weights": "nonsense"}), "init"),
        (Lora(extra={"use_dora": True}), "use_dora"),
    ],
    ids=["layers", "rank", "option", "start", "twice"],
)
def test_adapters_that_do_not_fit(lora: Lora, said: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.lora cannot be put on this model: .*{said}"):
        causal_lm("gift:countdown", lora=lora)
