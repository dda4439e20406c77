"""Rollouts by a vLLM engine of this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.generation import Completion
from gift_lightning.modes import has_adapters
from gift_lightning.rollouts import RolloutEngine, Sampling
from gift_lightning.vllm_sampling import logprobs_mode, parameters
from gift_lightning.vllm_weights import Handover, check_adapters, max_lora_rank


class VLLMColocate(RolloutEngine):
    """vLLM beside the trainer, on the same GPU and in the same environment; for a single process.

    On a GPU it sleeps while the policy trains: its weights lie in the machine's memory, and the
    memory of its cache is free. Weights are handed over as to a server, and as much is promised of
    seeds as by `VLLMServerRollout`.

    Args:
        gpu_memory_utilization: share of the device's memory for vLLM while it samples.
        options: further arguments of vllm.LLM.
        shared_folder: where weights are handed over; by default the machine's folder for temporary
            files.
    """

    def __init__(
        self,
        gpu_memory_utilization: float = 0.3,
        options: dict[str, Any] | None = None,
        shared_folder: str | None = None,
    ) -> None:
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(
                "VLLMColocate.gpu_memory_utilization must be above 0 and at most 1, got "
                f"{gpu_memory_utilization}."
            )
        self.gpu_memory_utilization, self.options = gpu_memory_utilization, options or {}
        self._handover = Handover(shared_folder)
        self._llm: Any = None
        self._adapter: Any = None
        self._sleeps = self._is_asleep = False

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        max_prompt_length: int,
    ) -> None:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ValueError(
                "VLLMColocate needs vllm beside gift-lightning: install it, or use "
                "VLLMServerRollout with an environment of its own."
            ) from error
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(
                "VLLMColocate is for a single process: use VLLMServerRollout, or trainer.devices=1."
            )
        check_adapters(model)
        mode, rank = logprobs_mode(sampling), max_lora_rank(model)
        self._sleeps = torch.cuda.is_available()
        self._handover.open()
        self._handover.write_base(model, tokenizer)
        options = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "max_model_len": max_prompt_length + sampling.max_completion_length,
            "logprobs_mode": mode,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_sleep_mode": self._sleeps,
            **({"enable_lora": True, "max_lora_rank": rank} if rank else {}),
            **self.options,
        }
        self._llm = LLM(model=str(self._handover.base), **options)
        self.sync(model)
        self._sleep()

    def sync(self, model: PreTrainedModel) -> None:
        from vllm.lora.request import LoRARequest

        self._wake()

        def load(name: str, folder: Path) -> None:
            if has_adapters(model):
                number = int(name.rpartition("-")[2])
                self._adapter = LoRARequest(name, number, str(folder))
                self._llm.llm_engine.add_lora(self._adapter)
            else:
                path = {"weights_path": str(folder)}
                self._llm.collective_rpc("reload_weights", kwargs=path)

        self._handover.update(model, load)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        sampling: Sampling,
        *,
        seed: int,
        keys: Sequence[int],
    ) -> list[list[Completion]]:
        from vllm import SamplingParams

        self._wake()
        salt = self._handover.name
        asked = [{"prompt_token_ids": list(ids), "cache_salt": salt} for ids in prompts]
        told = [parameters(sampling, num_samples, seed, key) for key in keys]
        how = [SamplingParams(**said, detokenize=False) for said in told]
        found = self._llm.generate(asked, how, lora_request=self._adapter, use_tqdm=False)
        self._sleep()
        return [
            [_completion(x) for x in sorted(of_one.outputs, key=lambda x: x.index)]
            for of_one in found
        ]

    def _wake(self) -> None:
        if self._is_asleep:
            self._llm.wake_up()
            self._is_asleep = False

    def _sleep(self) -> None:
        if self._sleeps:
            self._llm.sleep(level=1)
            self._is_asleep = True

    def close(self) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._adapter = None
            self._is_asleep = False
        self._handover.close()


def _completion(found: Any) -> Completion:
    tokens = list(found.token_ids)
    steps = zip(found.logprobs, tokens, strict=True)
    logprobs = [float(step[token].logprob) for step, token in steps]
    return Completion(tokens, logprobs, found.finish_reason == "stop")
