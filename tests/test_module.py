"""What any stage owes its run: the end is validated once, whatever schedule the user asks for."""

import csv
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from gift_lightning.cli import main
from gift_lightning.targets import OneHot
from test_render import GEMMA, byte_tokenizer
from test_sft import UnevenData, _fit, _module


class Validated(pl.Callback):
    """The optimizer steps after which a validation ended."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer, pl_module) -> None:
        self.steps.append(trainer.global_step)


class Stop(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def validated(folder: Path, *callbacks: pl.Callback, **options) -> list[int]:
    """Ten steps an epoch."""
    seen = Validated()
    module = _module(OneHot(), max_skipped_steps=1)
    _fit(module, UnevenData(batch_size=3), folder, callbacks=[seen, *callbacks], **options)
    assert options.get("ckpt_path") or seen.steps == sorted(set(seen.steps)), "one at a time"
    return seen.steps


BY_STEP = {"check_val_every_n_epoch": None}
SCHEDULES = {
    "every epoch": ({"max_epochs": 2}, [10, 20]),
    "every 6 steps": ({**BY_STEP, "val_check_interval": 6, "max_epochs": 2}, [6, 12, 18, 20]),
    "every 15 steps": ({**BY_STEP, "val_check_interval": 15, "max_epochs": 3}, [15, 30]),
    "every 4 batches of an epoch": (
        {"val_check_interval": 4, "max_epochs": 2},
        [4, 8, 14, 18, 20],
    ),
    "every third epoch": ({"check_val_every_n_epoch": 3, "max_epochs": 2}, [20]),
    "every second of three": ({"check_val_every_n_epoch": 2, "max_epochs": 3}, [20, 30]),
    "by time": ({"val_check_interval": "00:01:00:00", "max_epochs": 2}, [20]),
    "max_steps within an epoch": ({"max_steps": 13, "max_epochs": -1}, [10, 13]),
    "max_steps at an epoch's end": ({"max_steps": 20, "max_epochs": -1}, [10, 20]),
    "max_steps by step": (
        {**BY_STEP, "val_check_interval": 6, "max_steps": 13, "max_epochs": -1},
        [6, 12, 13],
    ),
    "max_steps just validated": (
        {**BY_STEP, "val_check_interval": 6, "max_steps": 12, "max_epochs": -1},
        [6, 12],
    ),
    "both limits": ({"check_val_every_n_epoch": 5, "max_steps": 25, "max_epochs": 2}, [20]),
    "short epochs": (
        {**BY_STEP, "limit_train_batches": 5, "val_check_interval": 4, "max_epochs": 2},
        [4, 8, 10],
    ),
    "accumulation": (
        {**BY_STEP, "accumulate_grad_batches": 4, "val_check_interval": 8, "max_epochs": 2},
        [2, 4, 6],
    ),
    "no validation": ({"limit_val_batches": 0, "max_epochs": 2}, []),
}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_schedule_is_the_users_and_the_end_is_validated_once(name, tmp_path):
    options, expected = SCHEDULES[name]
    assert validated(tmp_path, **options) == expected


def test_a_run_that_is_stopped_is_validated_at_its_end(tmp_path):
    options = {**BY_STEP, "val_check_interval": 6, "max_epochs": 3}
    assert validated(tmp_path, Stop(14), **options) == [6, 12, 14]
    assert validated(tmp_path, Stop(14), **options, min_steps=17) == [6, 12, 17]
    assert validated(tmp_path, Stop(3), check_val_every_n_epoch=4) == [3]


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 20}])
@pytest.mark.parametrize("step", [4, 10, 18, 19])
def test_a_resumed_run_is_validated_as_the_whole_one(step, limit, tmp_path):
    options = {**BY_STEP, "val_check_interval": 6, **limit}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = validated(tmp_path, saver, **options)
    assert whole == [6, 12, 18, 20]
    path = tmp_path / f"step={step}.ckpt"
    assert validated(tmp_path, **options, ckpt_path=path) == [x for x in whole if x > step]


@pytest.mark.parametrize(
    "options", [BY_STEP | {"val_check_interval": 6}, {"val_check_interval": 4}]
)
def test_a_run_that_goes_on_from_its_end(options, tmp_path):
    """From a checkpoint that the last validation saved, off the schedule."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", monitor="val/nll", save_top_k=-1)
    ends = validated(tmp_path, saver, **options, max_epochs=-1, max_steps=13)
    path = tmp_path / "step=13.ckpt"
    more = validated(tmp_path, **options, max_epochs=-1, max_steps=25, ckpt_path=path)
    if "check_val_every_n_epoch" in options:
        assert (ends, more) == ([6, 12, 13], [18, 24, 25])
    else:
        assert (ends, more) == ([4, 8, 13], [14, 18, 24, 25])


def test_a_trainer_that_goes_on_keeps_its_schedule(tmp_path):
    seen, module = Validated(), _module(OneHot())
    options = {**BY_STEP, "val_check_interval": 6, "callbacks": [seen]}
    _fit(module, UnevenData(batch_size=3), tmp_path, **options)
    module.trainer.fit_loop.max_epochs = 3
    module.trainer.fit(module, module.trainer.datamodule)
    assert seen.steps == [6, 10, 12, 18, 24, 30]


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": -1, "max_steps": 13},
        {"check_val_every_n_epoch": 2},
        {"val_check_interval": 4},
    ],
    ids=repr,
)
def test_checkpoints_and_logs_see_the_last_validation(options, tmp_path):
    """A monitoring checkpoint is of the metric at the end, which metrics.csv has in its place."""
    saver = ModelCheckpoint(
        tmp_path, filename="{step}", monitor="val/nll", mode="min", save_top_k=-1, save_last="link"
    )
    seen, module = Validated(), _module(OneHot())
    pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[seen, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        **{"max_epochs": 1, **options},
    ).fit(module, UnevenData(batch_size=3))
    metrics = module.trainer.callback_metrics
    end = seen.steps[-1]
    assert end == module.global_step
    assert f"step={end}.ckpt" in {Path(path).name for path in saver.best_k_models}
    assert saver.current_score == metrics["val/nll"]
    assert (tmp_path / "last.ckpt").resolve().name == f"step={end}.ckpt"
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [(int(row["step"]) + 1, row["val/nll"]) for row in rows if row["val/nll"]]
    assert [step for step, _ in logged] == seen.steps
    assert float(logged[-1][1]) == pytest.approx(float(metrics["val/nll"]))
    trained = [int(row["step"]) + 1 for row in rows if row["train/loss"]]
    assert trained == [10], "nothing is logged between the steps that log"


@pytest.mark.parametrize(
    "words", [["--config=twice.yaml"], ["-c=twice.yaml"], ["-c", "twice.yaml"]]
)
def test_a_config_given_in_either_form_may_not_repeat_keys(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("twice.yaml").write_text("trainer:\n  max_steps: 1\ntrainer:\n  max_steps: 3\n")
    with pytest.raises(SystemExit):
        main(["fit", *words])
    assert "twice.yaml:3: 'trainer' stands here and in line 1" in capsys.readouterr().err


def test_a_name_without_a_value_is_not_logged_with_its_last_one(tmp_path: Path) -> None:
    module = _module(OneHot())
    real = module.step_metrics

    def sometimes() -> dict:
        return {**real(), **({"sometimes": 7.0} if module.global_step == 2 else {})}

    module.step_metrics = sometimes  # type: ignore[method-assign]
    logger = CSVLogger(tmp_path, name="", version="")
    _fit(
        module, UnevenData(batch_size=3), tmp_path, logger=logger, log_every_n_steps=1, max_steps=4
    )
    with (tmp_path / "metrics.csv").open() as file:
        found = [row["train/sometimes"] for row in csv.DictReader(file) if row["train/loss"]]
    assert found == ["", "7.0", "nan", "nan"]


def test_no_gradient_waits_for_the_next_forward_pass(tmp_path: Path) -> None:
    module = _module(OneHot(), max_skipped_steps=1)
    module.policy.register_forward_pre_hook(
        lambda policy, _: seen.append(any(p.grad is not None for p in policy.parameters()))
    )
    seen: list[bool] = []
    _fit(module, UnevenData(batch_size=3), tmp_path, max_steps=3, limit_val_batches=0)
    assert len(seen) == 3 and not any(seen)


def test_the_end_of_a_turn_ends_a_completion():
    """Also where it is special only as an added token; a letter that ends every sample is not."""
    tokenizer = byte_tokenizer(GEMMA)
    module = _module(OneHot())
    module.tokenizer = tokenizer
    turn, letter = tokenizer.convert_tokens_to_ids("<end_of_turn>"), tokenizer("a")["input_ids"][-1]
    assert turn not in tokenizer.all_special_ids
    examples = SimpleNamespace(last_learned=lambda: [turn, letter])
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(train_examples=examples))
    assert turn in module.end_ids and tokenizer.eos_token_id in module.end_ids
    assert letter not in module.end_ids
