"""Tokens per second of HFRollout against `model.generate`, on the same prompts and lengths.

    python benchmarks/rollout.py

Every cell is the median of some runs, taken in turn in one process. "all": no completion ends
before the limit, so that both compute the same tokens; "natural": completions end where they end,
and each engine is counted by the tokens that it returns up to there. Log-probabilities are on for
both, as RL needs them.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from gift_lightning.models import causal_lm, load_tokenizer
from gift_lightning.problems import CountdownProblems
from gift_lightning.rollouts import HFRollout, Sampling

Engine = Callable[[list[list[int]], int, Sampling, int], int]


def hf_rollout(model: torch.nn.Module, batch_size: int) -> Engine:
    engine = HFRollout(batch_size)  # all side by side, as `generate` has them
    engine.sync(model)

    def run(prompts: list[list[int]], n: int, sampling: Sampling, seed: int) -> int:
        keys = range(len(prompts))
        groups = engine.generate(prompts, n, sampling, seed=seed, keys=keys)
        return sum(len(one.tokens) for group in groups for one in group)

    return run


def generate(model: torch.nn.Module, pad: int) -> Engine:
    def run(prompts: list[list[int]], n: int, sampling: Sampling, seed: int) -> int:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_return_sequences=n,
                do_sample=True,
                temperature=sampling.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=sampling.max_completion_length,
                eos_token_id=list(sampling.end_ids) or None,
                pad_token_id=pad,
                return_dict_in_generate=True,
                output_scores=True,
            )
        model.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        rows = out.sequences[:, longest:].tolist()
        ends = set(sampling.end_ids)
        stops = (next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in rows)
        return sum(stops)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    model, tokenizer = causal_lm("gift:countdown").eval(), load_tokenizer("gift:countdown")
    problems = CountdownProblems("train", "any", options.prompts).load()
    prompts = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
    engines = {"model.generate": generate(model, tokenizer.pad_token_id)}
    engines["HFRollout"] = hf_rollout(model, options.prompts * options.samples)
    table = Table("lengths", "engine", "tokens", "seconds", "tokens/s", "ratio")
    for name, ends in (("all", ()), ("natural", (tokenizer.eos_token_id,))):
        sampling = Sampling(options.tokens, end_ids=ends)
        seconds: dict[str, list[float]] = {engine: [] for engine in engines}
        tokens: dict[str, list[int]] = {engine: [] for engine in engines}
        for repeat in range(options.repeats + 1):
            for engine, run in engines.items():
                start = time.perf_counter()
                count = run(prompts, options.samples, sampling, repeat)
                if repeat:  # the first warms up
                    seconds[engine].append(time.perf_counter() - start)
                    tokens[engine].append(count)
        base = 0.0
        for engine in engines:
            rate = sum(tokens[engine]) / sum(seconds[engine])
            base = base or rate
            table.add_row(
                name,
                engine,
                f"{statistics.mean(tokens[engine]):,.0f}",
                f"{statistics.median(seconds[engine]):.3f}",
                f"{rate:,.0f}",
                f"{rate / base:.2f}",
            )
    Console().print(table)
    print(f"{options.prompts} prompts x {options.samples}, torch threads {torch.get_num_threads()}")


if __name__ == "__main__":
    main()
