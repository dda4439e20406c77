"""A vLLM server that a run starts, and that ends with it."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gift_lightning import watchdog
from gift_lightning.vllm_client import VLLMClient

_TICK = 0.5  # seconds between two looks whether it is ready
_ANSWER = 10.0  # seconds for such a look
_STOP = 30.0  # seconds that it has to end
_ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # weights are loaded at run time
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_NO_USAGE_STATS": "1",  # nothing is reported to anybody
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Launch:
    """How a vLLM server is started, on this machine and for this run alone.

    Attributes:
        python: interpreter of an environment that has vllm; by default the one that trains.
        args: further arguments of ``vllm serve``, such as --gpu-memory-utilization=0.5.
        environment: further variables, such as CUDA_VISIBLE_DEVICES.
        timeout: seconds until it must be ready.
    """

    python: str | None = None
    args: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    timeout: float = 600.0


class VLLMServer:
    """A server process, which only this machine can reach.

    Args:
        launch: how it is started.
        model: folder of what it serves; beside it lies its log.
        args: what it is told; `launch` has the last word.

    Raises:
        ValueError: there is no vllm to start.
    """

    def __init__(self, launch: Launch, model: Path, args: Sequence[str]) -> None:
        python = launch.python or sys.executable
        if launch.python is None and importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "vllm is not installed beside gift-lightning: name the interpreter of an "
                "environment that has it, VLLMServerRollout.launch.python."
            )
        if shutil.which(python) is None:
            raise ValueError(f"VLLMServerRollout.launch.python={python!r} is no interpreter.")
        self.launch, self.log = launch, model.with_name("server.log")
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(port), *args, *launch.args]
        environment = {**os.environ, **_ENVIRONMENT, **launch.environment}
        if launch.python is not None:  # packages of this interpreter are none of that one
            environment.pop("PYTHONPATH", None)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", watchdog.__file__, *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def wait(self) -> None:
        """Raises RuntimeError if it ends, or is not ready in time."""
        client = VLLMClient(self.url, _ANSWER, 0, self.death)
        deadline = time.monotonic() + self.launch.timeout
        while time.monotonic() < deadline:
            with suppress(RuntimeError):
                client.get("/health")
                return
            if said := self.death():
                raise RuntimeError(said)
            time.sleep(_TICK)
        raise RuntimeError(
            f"the vLLM server that this run started is not ready after {self.launch.timeout:g} s: "
            "raise VLLMServerRollout.launch.timeout."
        )

    def death(self) -> str | None:
        """What happened, if it has ended."""
        if self._process.poll() is None:
            return None
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        errors = re.findall(r"\b\w+(?:Error|Exception): .*", log)
        # vLLM's own last word is that there was another.
        causes = [x for x in errors if "root cause" not in x] or log.split("\n")[-2:-1]
        why = causes[-1] if causes else "it said nothing"
        return (
            f"the vLLM server that this run started has ended ({why}): start one by hand to see "
            "all that it says."
        )

    def close(self) -> None:
        """Lets go of its watchdog, which ends it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
