"""`gift export`: what is written computes what the checkpoint does, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gift_lightning import export
from gift_lightning.cli import main
from gift_lightning.models import Lora, causal_lm, embedded_path, tiny_llama
from gift_lightning.quantization import four_bit
from gift_lightning.sft import SFT
from test_cli import TINY

LORA = {
    "class_path": "gift_lightning.models.causal_lm",
    "init_args": {"pretrained": "gift:countdown", "lora": {"r": 2}},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of four steps, with a checkpoint in the middle: all weights, and adapters."""
    folder = tmp_path_factory.mktemp("runs")
    config = yaml.safe_load(TINY)
    config["trainer"].pop("enable_checkpointing", None)
    checkpoint = {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True}
    checkpoint["filename"] = "{step}"
    config["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": checkpoint}]
    for name in ("full", "lora"):
        if name == "lora":
            config["model"]["init_args"]["model"] = LORA
            config["model"]["init_args"]["reference"] = "AdapterOff"
        root = str(folder / name)
        config["trainer"]["callbacks"][0]["init_args"]["dirpath"] = f"{root}/checkpoints"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        words = ["fit", "--config", str(folder / f"{name}.yaml"), "--trainer.max_steps", "4"]
        main([*words, "--trainer.default_root_dir", root])
    return folder


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("policy.model."): x for name, x in state.items()}


def test_the_end_is_what_training_exported(runs: Path, tmp_path: Path) -> None:
    main(["export", "--run", str(runs / "full"), "--out", str(tmp_path / "out")])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(runs / "full" / "hf").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ends = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (tmp_path / "out", runs / "full" / "hf")
    ]
    assert ends[0] == ends[1]
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


def test_a_template_and_a_padding_token_go_along(tmp_path: Path) -> None:
    module = SFT(tiny_llama(hidden_size=16, num_layers=1, num_heads=2))
    module.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    module.export(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == module.tokenizer.chat_template
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert found["pad_token_id"] == tokenizer.pad_token_id is not None
    assert found["eos_token_id"] == tokenizer.eos_token_id


def test_any_checkpoint_in_several_files_and_another_precision(runs: Path, tmp_path: Path) -> None:
    middle = runs / "full" / "checkpoints" / "step=2.ckpt"
    words = ["--run", str(runs / "full"), "--checkpoint", str(middle), "--out", str(tmp_path / "x")]
    main(["export", *words, "--dtype", "bfloat16", "--max_shard_size", "2KB"])
    assert len(list((tmp_path / "x").glob("model-*.safetensors"))) > 1
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert found.dtype == torch.bfloat16
    saved = weights(middle)
    for name, x in found.named_parameters():
        assert torch.equal(x, saved[name].bfloat16())


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_stay_or_are_merged(runs: Path, tmp_path: Path, merge: bool) -> None:
    out = tmp_path / "deep" / "out"
    words = ["export", "--run", str(runs / "lora"), "--out", str(out)]
    main([*words, *(["--merge"] if merge else [])])
    kind = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    ids = torch.arange(1, 7)[None]
    with torch.no_grad():
        found = kind.from_pretrained(out)(input_ids=ids).logits
        expected = AutoPeftModelForCausalLM.from_pretrained(runs / "lora" / "hf")(input_ids=ids)
    torch.testing.assert_close(found, expected.logits, rtol=1e-5, atol=1e-5)
    assert (out / "adapter_config.json").is_file() is not merge
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["library_name"] == (
        "transformers" if merge else "peft"
    )


def test_adapters_on_a_base_that_cannot_be_loaded_again_are_merged(tmp_path: Path) -> None:
    config = yaml.safe_load(TINY)
    config["model"]["init_args"]["model"]["init_args"]["lora"] = {"r": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    root = str(tmp_path / "run")
    main(["fit", "--config", str(tmp_path / "run.yaml"), "--trainer.default_root_dir", root])
    main(["export", "--run", root, "--out", str(tmp_path / "out")])
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "library_name: transformers" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def qlora(runs: Path) -> Path:
    """Two steps on a 4-bit base."""
    pytest.importorskip("bitsandbytes", reason="no 4-bit weights here: bitsandbytes is missing")
    config = yaml.safe_load((runs / "lora.yaml").read_text())
    made = {"load_in_4bit": True, "lora": {"r": 2, "use_rslora": True}}
    config["model"]["init_args"]["model"]["init_args"].update(made)
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "bitsandbytes.optim.AdamW8bit",
        "init_args": {"lr": 0.02},  # far from the base in two steps
    }
    del config["trainer"]["callbacks"]
    (runs / "qlora.yaml").write_text(yaml.safe_dump(config))
    words = ["--config", str(runs / "qlora.yaml"), "--trainer.max_steps", "2"]
    main(["fit", *words, "--trainer.default_root_dir", str(runs / "qlora")])
    return runs / "qlora"


def test_adapters_of_a_quantized_base(qlora: Path, tmp_path: Path) -> None:
    """As such, and merged into either form of the base, each of which is close to what it names."""
    ids = torch.arange(1, 20)[None]
    found = {}
    for name, flags in {
        "adapters": [],
        "dequantized": ["--merge"],
        "original": ["--merge", "--base", "original"],
    }.items():
        main(["export", "--run", str(qlora), "--out", str(tmp_path / name), *flags])
        if name != "adapters":
            model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
            assert "quantization_config" not in model.config.to_dict()
            with torch.no_grad():
                found[name] = model(input_ids=ids).logits
            card = (tmp_path / name / "README.md").read_text()
            assert f"4-bit base, merged into its {name} weights" in card
    kind, base = AutoPeftModelForCausalLM, tmp_path / "adapters"
    with torch.no_grad():
        sixteen = kind.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
        four = kind.from_pretrained(base, **four_bit("float32"))(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(embedded_path("gift:countdown"))
        moved = (plain(input_ids=ids).logits - sixteen).abs().max()
    torch.testing.assert_close(found["original"], sixteen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["dequantized"], four, atol=1e-4, rtol=1e-4)
    assert (four - sixteen).abs().max() > 0.1 and moved > 0.3


def test_a_float32_merge_is_not_rounded_first() -> None:
    lora = Lora(r=2, extra={"init_lora_weights": False})
    model = causal_lm("gift:countdown", "bfloat16", lora=lora)
    wide, half = (export.prepared(model, True, dtype) for dtype in ("float32", "bfloat16"))
    for layer in ("q_proj", "down_proj"):
        name = next(n for n, _ in wide.named_parameters() if layer in n)
        base = model.get_parameter(
            f"base_model.model.{name}".replace(".weight", ".base_layer.weight")
        )
        part = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        exact = base.float() + part.get_delta_weight("default")
        torch.testing.assert_close(wide.get_parameter(name), exact, atol=1e-6, rtol=1e-6)
        assert wide.get_parameter(name).dtype == torch.float32
        assert half.get_parameter(name).dtype == torch.bfloat16


def test_what_is_uploaded_is_what_was_checked(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: dict[str, object] = {}

    def push(self: object, name: str, **options: object) -> None:
        assert name == "me/mine"
        pushed[type(self).__name__] = self

    for part in (PreTrainedModel, PreTrainedTokenizerBase, GenerationConfig, ModelCard):
        monkeypatch.setattr(part, "push_to_hub", push)
    out = tmp_path / "out"
    words = ["--run", str(runs / "full"), "--out", str(out), "--push-to-hub", "me/mine"]
    main(["export", *words])
    assert pushed.keys() >= {"LlamaForCausalLM", "GenerationConfig", "ModelCard"}
    assert len(pushed) == 4
    card = pushed["ModelCard"]
    assert isinstance(card, ModelCard) and "SFT towards GIFT" in card.content
    generation = pushed["GenerationConfig"]
    assert isinstance(generation, GenerationConfig)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert generation.eos_token_id == ends


def test_the_card_says_how_it_was_made(runs: Path, tmp_path: Path) -> None:
    main(["export", "--run", str(runs / "full"), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "SFT towards GIFT(beta=3" in card and "last.ckpt" in card
    assert "[2601.09233](https://arxiv.org/abs/2601.09233)" in card
    assert "val/in/nll" in card and "CountdownData" in card
    assert (runs / "full" / "config.yaml").read_text() in card


def test_a_folder_that_computes_something_else_is_not_kept(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.model_card

    def spoil(*args: object) -> str:
        path = next(tmp_path.glob(".out.part/*.safetensors"))
        path.write_bytes(path.read_bytes()[:-400] + bytes(400))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "model_card", spoil)
    with pytest.raises(RuntimeError, match="computes something else"):
        export.main(["--run", str(runs / "full"), "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_a_sample_that_meets_an_end_of_training(tmp_path: Path, lora: Lora | None) -> None:
    """Which the folder names, and the model itself does not."""
    module = SFT(causal_lm("gift:countdown", lora=lora))
    ids = torch.arange(1, 9)[None]
    sample = module.model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)[0].tolist()
    assert len(sample) > 10
    module.export(str(tmp_path), None, [module.tokenizer.eos_token_id, sample[9]])
    export.check(module.model, tmp_path)


@pytest.mark.parametrize("lora", [None, Lora(r=2)], ids=["full", "lora"])
def test_attention_other_than_by_default(tmp_path: Path, lora: Lora | None) -> None:
    """It rounds differently, and no folder says how it was trained."""
    model = causal_lm("gift:countdown", "bfloat16", attn_implementation="eager", lora=lora)
    SFT(model).export(str(tmp_path))
    export.check(model, tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "{runs}/nothing"], "has no config.yaml"),
        (["--run", "{runs}/full", "--checkpoint", "{runs}/no.ckpt"], "no.ckpt is no file"),
        (["--run", "{runs}/full", "--merge"], "trained no adapters"),
        (["--run", "{runs}/lora", "--dtype", "bfloat16"], "adapters stay as they are, add --merge"),
        (["--run", "{runs}/lora", "--merge", "--base", "original"], "on a quantised base"),
        (["--run", "{runs}/full", "--out", "{runs}/full"], "is not empty"),
        (
            ["--run", "{runs}/full", "--checkpoint", "{runs}/lora/checkpoints/last.ckpt"],
            "of another model",
        ),
    ],
)
def test_what_cannot_be_exported(
    runs: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(runs=runs) for word in words]
    out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["export", *given, *out])
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
