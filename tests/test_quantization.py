"""QLoRA: a 4-bit base that nothing changes, adapters that train on it and leave it whole."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch import Tensor, nn

from gift_lightning import quantization
from gift_lightning.cli import main
from gift_lightning.export import prepared
from gift_lightning.models import Lora, causal_lm
from gift_lightning.modes import adapter_off, sampling, scoring
from gift_lightning.policy import Policy, supervised_labels
from gift_lightning.quantization import merged
from gift_lightning.references import AdapterOff, FrozenCopy, Probe
from gift_lightning.sft import SFT
from gift_lightning.targets import GIFT
from test_cli import TINY
from test_policy import gradients
from test_references import batch, train
from test_sft import UnevenData, _fit, _weights

bnb = pytest.importorskip("bitsandbytes", reason="no 4-bit weights here: bitsandbytes is missing")

KINDS = {"lora": Lora(r=2), "rslora": Lora(r=2, use_rslora=True), "dora": Lora(r=2, use_dora=True)}
# Its start moves a part of the base weights into the adapters.
OLORA = Lora(r=2, alpha=2, extra={"init_lora_weights": "olora"})
# What transformers, peft and bitsandbytes say about models of this size.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def qlora(lora: Lora | None = KINDS["lora"], dtype="float32", away=False, **options):
    """The embedded model in 4 bits; `away` moves the adapters from their start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = causal_lm("gift:countdown", dtype, lora=lora, load_in_4bit=True, **options)
        if away:
            nudge(model)
    return model


def nudge(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)


def dense(model) -> dict[str, Tensor]:
    """What the 4-bit weights mean."""
    return {
        name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and bool(a) and all(torch.equal(a[n], b[n]) for n in a)


def logits(model) -> Tensor:
    with scoring(model):
        return model(input_ids=torch.arange(1, 20)[None]).logits


# --- what is loaded -------------------------------------------------------------------------


def test_layers_are_nf4_adapters_single_and_the_rest_as_told():
    model = qlora(dtype="bfloat16")
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 21  # seven in each of three decoder layers: not the head
    for layer in layers:
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.dtype == torch.float32
        else:
            assert not parameter.requires_grad
            assert parameter.dtype in (torch.bfloat16, torch.uint8)
    assert all(module.training for module in model.modules())
    assert model.num_parameters() > 600_000  # of which each byte holds two


def test_an_adapter_names_the_revision_of_its_base():
    model = causal_lm("gift:countdown", lora=Lora(r=2), revision="abc")
    assert model.peft_config["default"].revision == "abc"


def test_a_folder_that_is_quantized_already(tmp_path):
    Policy(qlora(None)).base.save_pretrained(tmp_path)
    again = causal_lm(str(tmp_path), lora=Lora(r=2))
    assert torch.equal(logits(again), logits(qlora()))
    assert same(dense(again), dense(qlora()))
    Policy(again).verify(packing=True)
    with pytest.raises(ValueError, match=r"--base original: .* is quantised itself"):
        quantization.unquantized(again)


# --- nothing changes it ---------------------------------------------------------------------


def test_no_cpu_packs_the_weights_anew(monkeypatch):
    """As bitsandbytes does in eval mode where it finds AVX-512 with bfloat16."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    of = Policy(qlora(dtype="bfloat16"))
    before = dense(of.model)
    of.verify(packing=True)
    assert same(dense(of.model), before)
    of(batch(), GIFT(3.0), reference=AdapterOff().rows(of, batch()))[0].sum().backward()
    assert any(g.any() for g in gradients(of).values())


@pytest.mark.parametrize("change", [lambda m: m.to("cpu"), lambda m: m.double(), copy.deepcopy])
def test_moving_and_casting_the_module_leaves_the_weights(change):
    module = SFT(qlora(away=True), GIFT(3.0), AdapterOff())
    before, expected = dense(module.model), logits(module.model)
    module = change(module)
    assert same(dense(module.model), before)
    torch.testing.assert_close(logits(module.model).float(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_trains_and_the_base_under_it_stays(kind, dtype):
    of, b = Policy(qlora(KINDS[kind], dtype)), batch(seed=3)
    of.verify(packing=True)
    base, before = AdapterOff(), dense(of.model)
    base.setup(of)
    copied = FrozenCopy()
    copied.setup(of)
    probes = [Probe(reference, of, b) for reference in (base, copied)]
    for parameter, gradient in train_once(of, base, b).items():
        assert "lora_" in parameter and gradient.isfinite().all()
    nudge(of.model)
    found = train_once(of, base, b)
    assert len(found) == sum(p.requires_grad for p in of.parameters())
    assert all(gradient.any() for gradient in found.values())
    train(of, base)
    for probe in probes:
        probe.check(of)
    assert same(dense(of.model), before)


def train_once(of: Policy, reference: AdapterOff, b) -> dict[str, Tensor]:
    of.zero_grad()
    of(b, GIFT(2.0), reference=reference.rows(of, b))[0].mean().backward()
    return gradients(of)


def test_gradient_checkpointing_changes_nothing():
    found = {}
    for on in (False, True):
        of = Policy(qlora(away=True, gradient_checkpointing=on))
        found[on] = train_once(of, AdapterOff(), batch())
    assert found[True].keys() == found[False].keys()
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name], atol=1e-6, rtol=1e-5)


def test_sampling_is_greedy_in_its_own_logits():
    model = qlora(away=True)
    ids = torch.arange(1, 9)[None]
    with sampling(model):
        out = model.generate(input_ids=ids, do_sample=False, max_new_tokens=4)
    with scoring(model):
        best = model(input_ids=out).logits.argmax(-1)
    assert torch.equal(out[:, 8:], best[:, 7:-1])


# --- a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit])
def test_a_resumed_run_is_bit_equal_and_its_checkpoint_holds_adapters(optimizer, tmp_path):
    def run(**kwargs) -> SFT:
        pl.seed_everything(0, verbose=False)
        module = SFT(
            qlora(Lora(r=2, dropout=0.2), "bfloat16"),
            GIFT(3.0),
            AdapterOff(),
            lambda p: optimizer(p, lr=1e-2, min_8bit_size=64),
        )
        data = UnevenData(n=26, batch_size=3)
        return _fit(module, data, tmp_path, accumulate_grad_batches=2, **kwargs)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(callbacks=[saver])
    state = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert state["state_dict"] and all("lora_" in name for name in state["state_dict"])
    (moments,) = (x for x in state["optimizer_states"][0]["state"][0].values() if type(x) is dict)
    assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    resumed = run(ckpt_path=tmp_path / "step=3.ckpt")
    assert resumed.global_step == 5
    assert torch.equal(_weights(resumed), _weights(whole))


# --- merging --------------------------------------------------------------------------------


@pytest.mark.parametrize("four", [True, False], ids=["4-bit", "dense"])
@pytest.mark.parametrize("kind", [*KINDS, "olora"])
def test_merged_is_what_was_trained(kind, four):
    lora = KINDS.get(kind, OLORA)
    if four:
        model = qlora(lora, away=True)
    else:
        model = causal_lm("gift:countdown", lora=lora)
        nudge(model)
    expected = logits(model)
    with adapter_off(model):
        base = logits(model)
    whole = merged(model)
    assert not isinstance(whole, PeftModel) and not quantization.is_quantized(whole)
    torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=1e-4)
    assert (base - expected).abs().max() > 0.1
    assert torch.equal(logits(model), expected)  # the model itself is left alone


def test_another_base_is_rewritten_as_the_first_was():
    model = causal_lm("gift:countdown", lora=OLORA)
    nudge(model)
    whole = merged(model, causal_lm("gift:countdown"))
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-4, rtol=1e-4)


# --- what is refused ------------------------------------------------------------------------


def test_the_whole_of_it_is_measured_but_not_trained(tmp_path, monkeypatch, capsys):
    Policy(qlora(None)).verify(packing=True)
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    flags = [
        *("--model.model", "gift_lightning.models.causal_lm"),
        *("--model.model.pretrained", "gift:countdown", "--model.model.load_in_4bit", "true"),
    ]
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "tiny.yaml", *flags])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and error.startswith("gift: error: ")
    assert "a quantised model cannot be trained as a whole: set model.model.lora" in error
    assert not [*tmp_path.glob("runs/*")]


def test_without_bitsandbytes(monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'gift-lightning\[qlora\]'"):
        qlora()


def test_files_that_are_not_read_in_four_bits(tmp_path):
    with pytest.raises(ValueError, match="cannot read a GGUF file: give the model's safetensors"):
        qlora(gguf_file="some.gguf")
    qlora().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot read adapters: give what `gift export --merge`"):
        causal_lm(str(tmp_path), load_in_4bit=True)


def test_adapters_that_rewrote_the_4_bit_base_fit_no_other():
    with pytest.raises(ValueError, match=r"rewrites the base .*'olora'.* or --base dequantized"):
        prepared(qlora(OLORA), True, None, "original")


def test_a_start_that_needs_dense_weights():
    lora = Lora(r=2, extra={"init_lora_weights": "pissa"})
    with pytest.raises(ValueError, match=r"model\.lora cannot be put on this model: .*float32"):
        qlora(lora)


def test_a_copy_has_the_weights_that_it_is_a_copy_of():
    of = Policy(qlora(away=True))
    with pytest.raises(ValueError, match=r"reference\.dtype=bfloat16 .* leave it out"):
        FrozenCopy(dtype="bfloat16").setup(of)
    copied = FrozenCopy()
    copied.setup(of)
    b = batch()
    found = copied.rows(of, b).logits(slice(0, len(supervised_labels(b))))
    assert torch.equal(found, of.head.project(of.hidden(b)).detach())


def test_a_quantised_head():
    model = qlora()
    head = model.get_base_model().lm_head
    head.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="head is quantised"):
        Policy(model)


def test_an_optimizer_of_a_package_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(TINY)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "tiny.yaml", "--model.optimizer", "not_a_package.AdamW8bit"])
    said = "gift: error: model.optimizer: 'not_a_package' is not installed.\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(said)
