"""`gift`: LightningCLI over every stage, with a folder for each run and one-sentence errors."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, cast

import lightning.pytorch as pl
import transformers
from jsonargparse import ArgumentError, set_parsing_settings
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gift_lightning import (
    cache,
    controllers,
    countdown_data,
    data,
    evaluation,
    gates,
    grpo,
    hybrid,
    hybrid_data,
    models,
    problems,
    prompts,
    references,
    rollouts,
    sft,
    sharding,
    targets,
    vllm_colocate,
    vllm_rollouts,
)
from gift_lightning.commands import APART
from gift_lightning.errors import one_sentence, own_error, refuse_repeated_keys
from gift_lightning.module import PolicyModule
from gift_lightning.run import ExportHF, Report, SaveConfig, own_folder
from gift_lightning.sharding import is_folder_of_shards

# What a config may name without its module: every class in these is imported here.
__all__ = [
    "cache",
    "controllers",
    "countdown_data",
    "data",
    "evaluation",
    "gates",
    "grpo",
    "hybrid",
    "hybrid_data",
    "models",
    "problems",
    "prompts",
    "references",
    "rollouts",
    "sft",
    "sharding",
    "targets",
    "vllm_colocate",
    "vllm_rollouts",
]

_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/gift",
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
    "num_sanity_val_steps": -1,  # a whole validation before training: step 0 of every curve
    "use_distributed_sampler": False,  # the data modules deal samples to devices themselves
}


class _Parser(LightningArgumentParser):
    def _add_signature_parameter(self, *args: Any, **kwargs: Any) -> Any:
        # Otherwise jsonargparse reads the data file behind `--data.train rows.jsonl` as a config.
        return super()._add_signature_parameter(*args, **{**kwargs, "sub_configs": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an inner parser that tries whether a value fits
            super().error(message, ex)
        print(f"gift: error: {one_sentence(message)}", file=sys.stderr)
        sys.exit(2)


class _ProgressBar(RichProgressBar):
    def _get_train_description(self, current_epoch: int) -> str:
        # A run that steps or time bound has no number of epochs, and Lightning shows -2.
        return super()._get_train_description(current_epoch).replace("/-2", "")


class GiftTrainer(pl.Trainer):
    """Lightning's Trainer with the commands that are not its own."""

    def cache_reference(
        self, model: PolicyModule, datamodule: data.SFTData, overwrite: bool = False
    ) -> None:
        """Write the reference's most likely tokens for all data, so that training runs without it.

        Args:
            model: with reference CachedTopK, whose path is written.
            datamodule: whose training and validation sets are cached.
            overwrite: replace a cache that is there.

        Raises:
            ValueError: if the model's reference is no CachedTopK, or it cannot be written.
        """
        if not isinstance(model.reference, cache.CachedTopK):
            raise ValueError(
                "cache-reference writes what model.reference reads: set `--model.reference "
                "CachedTopK --model.reference.path FOLDER`."
            )
        model.policy.verify(packing=False)
        datamodule.prepare(model.tokenizer, model.vocab_size)
        datamodule.report()
        model.policy.to(self.strategy.root_device)
        batch_size = datamodule.batch_size
        model.reference.write(model.policy, model.tokenizer, datamodule.sets, batch_size, overwrite)


def build_model(said: dict[str, Any]) -> PolicyModule:
    """The module that the `model` part of a config describes.

    Raises:
        ValueError: it does not parse, or cannot be built.
    """
    parser = _Parser(exit_on_error=False)
    parser.add_lightning_class_args(PolicyModule, "model", subclass_mode=True)
    try:
        parsed = parser.parse_object({"model": said})
    except ArgumentError as error:
        raise ValueError(one_sentence(str(error))) from error
    return cast(PolicyModule, parser.instantiate_classes(parsed).model)


class GiftCLI(LightningCLI):
    """LightningCLI whose flags mean what they say, also when a checkpoint is resumed."""

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        with ExitStack() as self._holds:  # the run's folder, until it ends or is refused
            super().__init__(
                PolicyModule,
                pl.LightningDataModule,
                trainer_class=GiftTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=SaveConfig,
                seed_everything_default=0,
                trainer_defaults=_DEFAULTS,
                parser_class=_Parser,
                parser_kwargs={"prog": "gift", "epilog": "`gift --help` lists all commands."},
                args=list(args) if args is not None else None,
                run=run,
            )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        inherited = LightningCLI.subcommands()
        commands = {name: inherited[name] for name in ("fit", "validate", "test")}
        return {**commands, "cache_reference": {"model", "datamodule"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> Any:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the report has the numbers
        return parser

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would merge a checkpoint's hyper-parameters over the flags."""

    def before_instantiate_classes(self) -> None:
        checkpoint = self.config[self.subcommand].get("ckpt_path")
        if checkpoint is not None and is_folder_of_shards(Path(checkpoint)):
            strategy = str(self.config[self.subcommand].trainer.strategy)
            if "fsdp2" not in strategy.lower():
                raise ValueError(
                    f"ckpt_path: {str(checkpoint)!r} is a folder of shards, which only "
                    "`--trainer.strategy fsdp2` reads, on any number of devices."
                )
        elif checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(
                f"ckpt_path: {str(checkpoint)!r} is no file; every run has its own folder, so give "
                "the checkpoint's path, for example runs/quickstart/checkpoints/last.ckpt."
            )
        if self.subcommand == "fit":
            trainer = self.config[self.subcommand].trainer
            folder = self._holds.enter_context(own_folder(trainer.default_root_dir))
            trainer.default_root_dir = str(folder)
            if trainer.max_epochs is None:  # Lightning would take 1000
                bounded = trainer.max_steps != -1 or trainer.max_time is not None
                trainer.max_epochs = -1 if bounded else 1

    def after_fit(self) -> None:
        """Refuses to call it a success when a resumed checkpoint left nothing to do."""
        if not self.model.guard.decided:
            raise ValueError(
                f"nothing was trained: the run starts at step {self.trainer.global_step} and ends "
                "there; raise trainer.max_steps or trainer.max_epochs."
            )

    def _instantiate_trainer(
        self, config: dict[str, Any], callbacks: list[pl.Callback]
    ) -> pl.Trainer:
        config = dict(config)
        root = config["default_root_dir"]
        given = config.get("callbacks") or []
        mine = [*given] if isinstance(given, list) else [given]
        if self.subcommand == "fit":
            if config.get("logger") in (None, True):
                config["logger"] = CSVLogger(root, name="", version="")
            saves = config.get("enable_checkpointing") in (None, True)
            if saves and not any(isinstance(c, ModelCheckpoint) for c in mine):
                mine.append(ModelCheckpoint(f"{root}/checkpoints", save_last="link"))
            if config.get("enable_progress_bar") in (None, True):
                mine.append(_ProgressBar(leave=False))
            mine.append(ExportHF())
        elif config.get("logger") is None:
            config["logger"] = False
        mine.append(Report())
        config["callbacks"] = mine
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"trainer cannot be set up here: {reason}") from error


class _BuiltError(Exception):
    pass


class _Unparsed(GiftCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _BuiltError(parser)


def fit_parser() -> LightningArgumentParser:
    """What parses the words of `gift fit`, as often as is wanted."""
    try:
        _Unparsed([])
    except _BuiltError as built:
        parser: LightningArgumentParser = built.args[0]
        return parser
    raise AssertionError("parsed without a parser")


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command of `gift`.

    An error that this package raises itself is one sentence and exit code 1, a command line or
    config that does not parse one sentence and exit code 2; anything else is a defect and keeps its
    traceback.
    """
    words = sys.argv[1:] if args is None else list(args)
    if words[:1] == ["cache-reference"]:  # the CLI names a command after its method
        words[0] = "cache_reference"
    sys.path.insert(0, os.getcwd())  # a target in the user's own file: --model.target mine.Mine
    # Read for every class that is named, which takes a second: only where it is shown.
    shown = any(word == "-h" or word.endswith(("help", "comments")) for word in words)
    set_parsing_settings(docstring_parse_attribute_docstrings=shown)
    # What Lightning says about itself, or about what is meant here.
    for said in (
        ".*LeafSpec.*",
        "LightningCLI's args.*",
        ".*logging interval.*",
        ".*has changed.*",
        ".*sync_dist=True.*",
    ):
        warnings.filterwarnings("ignore", message=said)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        for word, after in pairwise([*words, ""]):
            flag, _, path = word.partition("=")
            if flag in ("-c", "--config"):
                refuse_repeated_keys(path or after)
        if words and words[0] in APART:
            import_module(f"gift_lightning.{words[0]}").main(words[1:])  # they import this module
            return
        GiftCLI(words)
    except Exception as error:
        ours = own_error(error)
        if ours is None:
            raise
        print(f"gift: error: {ours}", file=sys.stderr)
        sys.exit(1)
