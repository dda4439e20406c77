"""A GRPO step, rollout, rewards and update, against TRL's GRPOTrainer on the same model and task.

    python benchmarks/grpo.py

Countdown from the embedded base, as configs/grpo.yaml has it: completions of up to 24 tokens,
sampled at temperature 1, one optimizer step for each rollout, no KL. TRL needs the `bench` extra.
"""

import argparse
import json
import tempfile
from typing import Any

from measuring import Clock, has_trl, machine, markdown, median, run_cells

GRPO, TRL = "GRPO", "TRL GRPOTrainer"
LR, LENGTH = 3e-4, 24


def ours(options: argparse.Namespace) -> dict[str, float]:
    import lightning.pytorch as pl
    from torch.optim import AdamW

    import gift_lightning.grpo as stage
    from gift_lightning.models import causal_lm
    from gift_lightning.problems import CountdownProblems
    from gift_lightning.prompts import PromptData
    from gift_lightning.rollouts import HFRollout

    steps = options.skip + options.steps
    module = stage.GRPO(
        causal_lm("gift:countdown"),
        ["Countdown"],
        max_completion_length=LENGTH,
        engine=HFRollout(options.prompts * options.samples),  # all at once, as TRL
        optimizer=lambda p: AdamW(p, lr=LR, weight_decay=0.0),
    )
    problems = CountdownProblems("train", "drawn", options.prompts * steps)
    data = PromptData(problems, options.prompts, options.samples, share_prompts=True)

    class Tick(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            clock.tick()

    trainer = pl.Trainer(
        max_steps=steps,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[Tick()],
    )
    clock = Clock(options.skip)
    trainer.fit(module, data)
    return clock.found()


def trl(options: argparse.Namespace) -> dict[str, float]:
    if not has_trl(TRL):
        return {}
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from gift_lightning import countdown
    from gift_lightning.models import causal_lm, load_tokenizer
    from gift_lightning.problems import CountdownProblems

    def reward(
        completions: list[str], numbers: list[list[int]], target: list[int], **_: Any
    ) -> list[float]:
        asked = zip(completions, numbers, target, strict=True)
        return [float(countdown.verify(text, [*some], goal)) for text, some, goal in asked]

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **more: Any) -> None:
            clock.tick()

    steps = options.skip + options.steps
    problems = CountdownProblems("train", "drawn", options.prompts * steps).load()
    tokenizer = load_tokenizer("gift:countdown")
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            causal_lm("gift:countdown"),
            reward,
            GRPOConfig(
                folder,
                per_device_train_batch_size=options.prompts * options.samples,
                num_generations=options.samples,
                max_completion_length=LENGTH,
                temperature=1.0,
                beta=0.0,
                max_steps=steps,
                learning_rate=LR,
                weight_decay=0.0,
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                gradient_checkpointing=False,
                use_cpu=True,
                bf16=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([{"prompt": x.prompt, **x.columns} for x in problems]),
            processing_class=tokenizer,
            callbacks=[Tick()],
        )
        clock = Clock(options.skip)
        trainer.train()
    return clock.found()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=24, help="of a rollout")
    parser.add_argument("--samples", type=int, default=16, help="completions of each")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps((trl if options.cell == TRL else ours)(options)))
        return
    flags = [f"--{x}={getattr(options, x)}" for x in ("prompts", "samples", "steps", "skip")]
    runs = run_cells(__file__, [GRPO, TRL], flags, options.threads, options.repeats)
    base = median(runs[GRPO], "seconds")
    print(f"{options.prompts} x {options.samples} completions.")
    print(f"{machine(options.threads, options.repeats)}\n")
    print(
        markdown(
            ("step", "seconds", "peak MiB", "time to GRPO's"),
            [
                (
                    cell,
                    f"{median(found, 'seconds'):.3f}",
                    f"{median(found, 'mib'):,.0f}",
                    f"{median(found, 'seconds') / base:.2f}",
                )
                for cell, found in runs.items()
            ],
        )
    )


if __name__ == "__main__":
    main()
