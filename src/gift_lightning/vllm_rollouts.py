"""Rollouts by a vLLM server."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift_lightning.generation import Completion
from gift_lightning.models import require_intact_base
from gift_lightning.modes import has_adapters
from gift_lightning.rollouts import RolloutEngine, Sampling
from gift_lightning.vllm_checks import check_server, served_model
from gift_lightning.vllm_client import RefusedError, VLLMClient
from gift_lightning.vllm_sampling import logprobs_mode, parameters
from gift_lightning.vllm_server import Launch, VLLMServer
from gift_lightning.vllm_weights import Handover, check_adapters, max_lora_rank

T = TypeVar("T")

_AT_ONCE = 64  # prompts that are asked for side by side; the server makes its own batches


class VLLMServerRollout(RolloutEngine):
    """A vLLM server, by its OpenAI-compatible interface: token ids in, token ids out.

    Before every rollout the policy is written to a folder and the server loads it from there: an
    adapter by ``/v1/load_lora_adapter``, all weights by ``reload_weights``.

    Every sample has a seed, so that a resumed run asks for the same; but what vLLM computes depends
    on what else it has to do, so two runs with one seed need not be bit-equal.

    Args:
        url: of a running server. Without it one is started, and ended with the run.
        launch: how one is started.
        shared_folder: where weights are handed over, for a server on another machine a folder that
            both see under the same name; by default the machine's folder for temporary files.
        timeout: seconds for one answer, which is all samples of a prompt.
        max_retries: repetitions of a request that is not answered.
    """

    def __init__(
        self,
        url: str | None = None,
        launch: Launch | None = None,
        shared_folder: str | None = None,
        timeout: float = 600.0,
        max_retries: int = 3,
    ) -> None:
        if not timeout > 0 or max_retries < 0:
            raise ValueError(
                "VLLMServerRollout needs a timeout above 0 and max_retries of at least 0, got "
                f"{timeout} and {max_retries}."
            )
        if url is not None and launch is not None:
            raise ValueError(
                "VLLMServerRollout.launch starts a server and VLLMServerRollout.url names one that "
                "runs: give one of them."
            )
        self.timeout, self.max_retries = timeout, max_retries
        self._given = None if url is None else self._client_of(url)
        self._launch = launch or Launch()
        self._handover = Handover(shared_folder)
        self._server: VLLMServer | None = None
        self._version = ""

    def start(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        max_prompt_length: int,
    ) -> None:
        check_adapters(model)
        if self._given is not None:  # it serves the base as it was; one of our own, as it now is
            require_intact_base(model, "VLLMServerRollout.launch")
        mode = logprobs_mode(sampling)

        def begin() -> str:
            self._handover.open()
            client = self._given
            if client is None:
                self._handover.write_base(model, tokenizer)
                length = max_prompt_length + sampling.max_completion_length
                client = self._client_of(self._started(model, mode, length))
            check_server(client, model, tokenizer, sampling, max_prompt_length)
            return client.url

        self._client = self._client_of(on_first_rank(begin))
        self._base = str(served_model(self._client)["id"])
        self.sync(model)  # what cannot be loaded is refused here

    def _started(self, model: PreTrainedModel, mode: str, length: int) -> str:
        args = ["--dtype", str(model.dtype).removeprefix("torch."), "--max-model-len", str(length)]
        args += ["--logprobs-mode", mode]
        if rank := max_lora_rank(model):
            args += ["--enable-lora", "--max-lora-rank", str(rank)]
        self._server = VLLMServer(self._launch, self._handover.base, args)
        self._server.wait()
        return self._server.url

    def _client_of(self, url: str) -> VLLMClient:
        return VLLMClient(url, self.timeout, self.max_retries, self._death)

    def _death(self) -> str | None:
        return None if self._server is None else self._server.death()

    def sync(self, model: PreTrainedModel) -> None:
        adapters = has_adapters(model)

        def load(name: str, folder: Path) -> None:
            if adapters:
                adapter = {"lora_name": name, "lora_path": str(folder)}
                # Its name is new; in place, so that it may be asked twice if an answer is lost.
                self._client.post("/v1/load_lora_adapter", {**adapter, "load_inplace": True})
            else:
                call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
                self._client.post("/collective_rpc", call)

        before = self._version
        self._version = on_first_rank(lambda: self._handover.update(model, load))
        self._model = self._version if adapters else self._base
        if before and adapters:
            on_first_rank(lambda: self._forget(before))

    def _forget(self, name: str) -> None:
        try:
            self._client.post("/v1/unload_lora_adapter", {"lora_name": name})
        except RefusedError as refusal:
            if refusal.status != 404:  # else it is forgotten, and the answer was lost
                raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int,
        sampling: Sampling,
        *,
        seed: int,
        keys: Sequence[int],
    ) -> list[list[Completion]]:
        def completed(prompt: Sequence[int], key: int) -> list[Completion]:
            asked = {"model": self._model, "prompt": list(prompt), "cache_salt": self._version}
            how = {**parameters(sampling, num_samples, seed, key), "return_token_ids": True}
            choices = self._client.post("/v1/completions", {**asked, **how})["choices"]
            return [_completion(x) for x in sorted(choices, key=lambda x: x["index"])]

        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            return list(pool.map(completed, prompts, keys))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        self._handover.close()
        self._version = ""


def _completion(choice: dict[str, Any]) -> Completion:
    tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    return Completion(tokens, logprobs, choice["finish_reason"] == "stop")


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, or the error that it raises there, on every rank."""
    if not torch.distributed.is_initialized():
        return action()
    found: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            found[0] = action()
        except Exception as error:  # nobody waits for what will not come
            found[1] = error
    torch.distributed.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result
