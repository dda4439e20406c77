"""The training loop: any split of a step is the same step, and a resumed run is the same run."""

import random
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gift_lightning.data import SFTData
from gift_lightning.functional import token_loss
from gift_lightning.models import Lora, tiny_llama
from gift_lightning.records import Record
from gift_lightning.references import AdapterOff, FrozenCopy
from gift_lightning.sft import GIFTSFT, SFT, StandardSFT, TargetSFT
from gift_lightning.targets import DFT, GIFT, IWSFT, PSFT, OneHot, Target


class UnevenData(SFTData):
    """Answers of 1 to 12 tokens, so that any averaging over the wrong count shows."""

    def __init__(self, n: int = 30, batch_size: int = 12, packing: bool = True) -> None:
        super().__init__(train=[], batch_size=batch_size, packing=packing, seed=3)
        self.n = n

    def train_records(self) -> Iterator[Record]:
        rng = random.Random(0)
        for i in range(self.n):
            prompt = "".join(rng.choices("123456789 ", k=rng.randint(1, 6))) + ": "
            yield Record(f"row {i}", "".join(rng.choices("123456789+-*", k=1 + i % 12)), prompt)

    def val_records(self) -> dict[str, Iterator[Record]]:
        return {"val": (r for i, r in enumerate(self.train_records()) if i < 7)}


def _module(target: Target, *, lora: bool = False, dropout: float = 0.0, **kwargs) -> SFT:
    adapters = Lora(r=4, alpha=8, dropout=dropout) if lora else None
    pl.seed_everything(0, verbose=False)  # adapters are drawn from the global stream
    model = tiny_llama(
        hidden_size=16, num_layers=2, num_heads=2, lora=adapters, seed=1, dropout=dropout
    )
    reference = AdapterOff() if lora else FrozenCopy()
    kwargs.setdefault("optimizer", lambda p: torch.optim.SGD(p, lr=1.0))
    return SFT(model, target, reference, **kwargs)


def _fit(module: SFT, data: pl.LightningDataModule, folder: Path, **kwargs) -> SFT:
    kwargs.setdefault("callbacks", [])
    kwargs.setdefault("max_epochs", 1)
    ckpt_path = kwargs.pop("ckpt_path", None)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=kwargs.pop("logger", False),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in kwargs["callbacks"]),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **kwargs,
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


def _weights(module: SFT) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("target", [OneHot(), GIFT(3.0), DFT(), IWSFT()], ids=lambda t: repr(t))
def test_any_split_of_a_step_gives_the_same_gradient(target, reduction, packing, tmp_path):
    start = _weights(_module(target))
    steps = []
    for batch, accumulate in [(12, 1), (4, 3), (1, 12)]:
        data = UnevenData(batch_size=batch, packing=packing)
        module = _module(target, reduction=reduction)
        _fit(module, data, tmp_path, max_steps=1, accumulate_grad_batches=accumulate)
        steps.append(start - _weights(module))
    assert steps[0].norm() > 1e-3
    for step in steps[1:]:
        assert (step - steps[0]).norm() / steps[0].norm() < 1e-6


@pytest.mark.parametrize("reduction", ["token", "sequence", "sequence_sum"])
def test_a_step_is_the_mean_over_its_tokens_or_sequences(reduction, tmp_path):
    """Against the dense loss of each sample by itself, summed by hand."""
    target = GIFT(2.0)
    module, data = _module(target, reduction=reduction), UnevenData(n=7, batch_size=7)
    before, reference = _weights(module), _module(target).model.eval()
    model = _module(target).model.train()
    data.prepare(module.tokenizer, module.vocab_size)
    total, tokens = torch.zeros(()), 0
    for i in range(7):
        ids, labels = data.train_examples[i]
        logits = model(input_ids=ids[None]).logits[0, :-1]
        base = reference(input_ids=ids[None]).logits[0, :-1].detach()
        losses = token_loss(target, logits, labels[1:], reference_logits=base)
        count = int((labels[1:] != -100).sum())
        total = total + (losses.sum() / count if reduction == "sequence" else losses.sum())
        tokens += count
    (total / (tokens if reduction == "token" else 7)).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    _fit(module, data, tmp_path, max_steps=1)
    step = before - _weights(module)
    assert (step - expected).norm() / expected.norm() < 1e-5


def test_micro_batch_reduction_sums_the_means_of_micro_batches(tmp_path):
    """The official GIFT code's: each micro-batch's token mean, not divided by their number."""
    target = OneHot()
    before = _weights(_module(target))
    data = UnevenData(n=8, batch_size=4)
    module = _fit(
        _module(target, reduction="micro_batch"), data, tmp_path, accumulate_grad_batches=2
    )
    model, expected = _module(target).model.train(), 0.0
    for micro_batch in data.train_dataloader():
        losses = []
        for i in micro_batch["sample_ids"].tolist():
            ids, labels = data.train_examples[i]
            logits = model(input_ids=ids[None]).logits[0, :-1]
            losses.append(token_loss(target, logits, labels[1:])[labels[1:] != -100])
        mean = torch.cat(losses).mean()
        model.zero_grad()
        mean.backward()
        expected = expected + torch.cat([p.grad.flatten() for p in model.parameters()])
    step = before - _weights(module)
    assert (step - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("lora", [False, True])
def test_splits_agree_after_twenty_steps(lora, tmp_path):
    """30 samples in windows of 12 leave a short window of 6 in every epoch."""
    ends = []
    for batch, accumulate in [(12, 1), (4, 3), (3, 4)]:
        module = _module(GIFT(4.0), lora=lora, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3))
        data = UnevenData(batch_size=batch)
        _fit(
            module,
            data,
            tmp_path,
            max_epochs=-1,
            max_steps=20,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
        )
        assert module.global_step == 20
        ends.append(_weights(module))
    for end in ends[1:]:
        assert (end - ends[0]).norm() / ends[0].norm() < 1e-5


@pytest.mark.parametrize(
    ("target", "lora"),
    [(GIFT(3.0), False), (GIFT(3.0), True), (PSFT(), False), (GIFT(trust=0.8), True)],
    ids=["full", "lora", "old-policy", "trust"],
)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(target, lora, tmp_path):
    """Every third step of two epochs, with dropout, accumulation, warm-up and both epoch ends."""

    def module() -> SFT:
        from gift_lightning.schedule import Schedule

        return _module(
            target,
            lora=lora,
            dropout=0.2,
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2),
            schedule=Schedule("cosine", warmup=2),
            old_policy_every=3,
        )

    def run(**kwargs) -> SFT:
        data = UnevenData(n=26, batch_size=3)  # windows of 6: 5 steps an epoch, the last one short
        return _fit(module(), data, tmp_path, max_epochs=2, accumulate_grad_batches=2, **kwargs)

    saver = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=False
    )
    whole = _weights(run(callbacks=[saver]))
    assert sorted(p.name for p in tmp_path.glob("*.ckpt"))
    for step in (1, 3, 4, 5, 6, 9):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.global_step == 10
        assert torch.equal(_weights(resumed), whole), f"resumed at step {step}"


def test_a_checkpoint_holds_only_what_is_trained(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="end", save_top_k=1)
    _fit(_module(GIFT(3.0), lora=True), UnevenData(), tmp_path, callbacks=[saver])
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert checkpoint["state_dict"] and all("lora" in name for name in checkpoint["state_dict"])
    assert "hyper_parameters" not in checkpoint


class _Poison(pl.Callback):
    """Puts NaN into a weight's gradient before some optimizer steps."""

    def __init__(self, steps: set[int]) -> None:
        self.steps = steps
        self.before: dict[int, Tensor] = {}

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step in self.steps:
            next(p for p in pl_module.parameters() if p.requires_grad).grad[0] = float("nan")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before[trainer.global_step] = _weights(pl_module)


def test_a_non_finite_step_is_skipped_counted_and_named(tmp_path):
    poison = _Poison({1})
    module = _module(OneHot(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    with pytest.warns(UserWarning, match="optimizer step 1 skipped: gradient norm is nan"):
        _fit(module, UnevenData(batch_size=10), tmp_path, callbacks=[poison])
    assert torch.equal(poison.before[1], poison.before[2])
    assert not torch.equal(poison.before[0], poison.before[1])
    assert _weights(module).isfinite().all()
    assert sum(module.guard.skipped.values()) == 1


def test_several_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    module = _module(OneHot(), max_skipped_steps=3)
    with pytest.raises(RuntimeError, match="3 optimizer steps in a row"):
        _fit(module, UnevenData(batch_size=5), tmp_path, callbacks=[_Poison(set(range(9)))])


def test_a_step_cut_by_a_limit_is_refused(tmp_path):
    data = UnevenData(batch_size=3)
    with pytest.raises(ValueError, match="limit_train_batches cuts an optimizer step: 3 micro"):
        _fit(_module(OneHot()), data, tmp_path, accumulate_grad_batches=2, limit_train_batches=3)
    module = _module(OneHot())
    _fit(
        module, UnevenData(batch_size=3), tmp_path, accumulate_grad_batches=2, limit_train_batches=4
    )
    assert module.global_step == 2


def test_accumulation_must_not_change_in_a_run(tmp_path):
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 2})
    with pytest.raises(ValueError, match="accumulate_grad_batches must not change in a run"):
        _fit(_module(OneHot()), UnevenData(), tmp_path, callbacks=[schedule], max_epochs=2)


def test_double_precision_with_a_reference_in_single(tmp_path):
    module = _module(GIFT(3.0))
    _fit(module, UnevenData(), tmp_path, precision="64-true", max_steps=1)
    assert _weights(module).dtype == torch.float64 and _weights(module).isfinite().all()


def test_trust_travels_with_the_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="end")
    trained = _fit(_module(GIFT(trust=0.8)), UnevenData(), tmp_path, callbacks=[saver])
    assert trained.target.trust is None and trained.target.beta > 0
    resumed = _module(GIFT(trust=0.8))
    resumed.on_load_checkpoint(torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert resumed.target == trained.target
    other = _module(GIFT(trust=0.7))
    other.on_load_checkpoint(torch.load(tmp_path / "end.ckpt", weights_only=True))
    assert other.target == GIFT(trust=0.7)


def test_a_run_without_validation_data(tmp_path):
    class Unvalidated(UnevenData):
        def val_records(self):
            return {}

    module = _fit(_module(GIFT(3.0)), Unvalidated(), tmp_path)
    assert module.global_step == 3


def test_another_number_of_validation_sets(tmp_path):
    """Each set has its own means, however many there were before."""

    class Pair(UnevenData):
        def val_records(self):
            rows = list(self.train_records())
            return {"easy": iter(rows[:5]), "hard": iter(rows[5:12])}

    module = _fit(_module(GIFT(3.0)), Pair(), tmp_path)
    assert {"val/easy/nll", "val/hard/nll"} <= module.trainer.callback_metrics.keys()
    trainer = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    (one,) = trainer.validate(module, datamodule=UnevenData(), verbose=False)
    first, second = trainer.validate(module, datamodule=Pair(), verbose=False)
    assert one["val/nll"] > 0 and {"val/easy/nll", "val/hard/nll"} <= (first | second).keys()


def test_trust_without_a_datamodule_is_refused(tmp_path):
    data, module = UnevenData(), _module(GIFT(trust=0.8))
    data.prepare(module.tokenizer, module.vocab_size)
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for loader in (data.train_dataloader(), None):
        plain = pl.LightningDataModule.from_datasets([0]) if loader is None else None
        with pytest.raises(ValueError, match=r"GIFT.*one_pass.*SFTData, or .*target.resolve"):
            trainer.fit(module, loader, datamodule=plain)


def test_dropout_is_on_in_training_and_off_in_validation(tmp_path):
    seen: dict[str, set[bool]] = {"train": set(), "val": set()}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args) -> None:
            seen["train"].add(pl_module.model.training)

        def on_validation_batch_start(self, trainer, pl_module, *args) -> None:
            seen["val"].add(pl_module.model.training)

    module = _module(GIFT(3.0), dropout=0.5)
    module.model.eval()  # as transformers loads it
    _fit(module, UnevenData(batch_size=5), tmp_path, callbacks=[Watch()], max_epochs=2)
    assert seen == {"train": {True}, "val": {False}}


def test_validation_reports_the_exact_token_means(tmp_path):
    target, data = GIFT(3.0), UnevenData(batch_size=3)
    module = _module(target, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    _fit(module, data, tmp_path)
    metrics = module.trainer.callback_metrics
    nll, tokens = torch.zeros(()), 0
    for i in range(7):
        ids, labels = data.sets["val"][i]
        logits = module.model(input_ids=ids[None]).logits[0, :-1]
        nll += token_loss(OneHot(), logits, labels[1:]).sum().detach()
        tokens += int((labels[1:] != -100).sum())
    torch.testing.assert_close(metrics["val/nll"], nll / tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(metrics["val/kl_reference"], torch.zeros(()), atol=1e-5, rtol=0)
    assert {"val/entropy", "val/kl_target", "val/label_mass", "val/gamma"} <= set(metrics)


def test_named_modules_fix_the_target_and_nothing_else():
    model = tiny_llama(hidden_size=16, num_layers=1, num_heads=2)
    assert StandardSFT(model).target == OneHot()
    assert GIFTSFT(model, beta=8, reference=FrozenCopy()).target == GIFT(8)
    assert TargetSFT(model, eta=0.2, reference=FrozenCopy()).target.eta == 0.2


def test_a_target_without_its_reference_is_refused():
    model = tiny_llama(hidden_size=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"GIFT needs a reference.*--model.reference FrozenCopy"):
        SFT(model, GIFT())
    with pytest.raises(ValueError, match="adapters to turn off"):
        _fit(SFT(model, GIFT(), AdapterOff()), UnevenData(), Path("unused"))
