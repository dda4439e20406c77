"""What is said to a vLLM server over HTTP: bounded in time, and one sentence when it fails."""

import http.client
import json
import os
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

_PAUSE = 0.5  # seconds before the first repetition, doubled each time
_CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
_LATER = (408, 429)  # it was slow, or has too much to do: not the request's fault
_OFFERED = {  # what a server must be started with to have the path at all
    "/collective_rpc": "VLLM_SERVER_DEV_MODE=1",
    "/v1/load_lora_adapter": (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and a --max-lora-rank of at least the "
        "adapter's"
    ),
}


class RefusedError(RuntimeError):
    """The server answers that it will not do this; `status` is HTTP's."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class VLLMClient:
    """Requests to one server; safe to use from several threads.

    A request that finds nobody, is cut off, is not answered in time or meets an error of the server
    is repeated. The server may have done by then what it was asked for: send only what can be asked
    twice.

    Args:
        url: of the server, without /v1.
        timeout: seconds for one answer.
        max_retries: repetitions of one request.
        dead: says why there is no use in trying any more, or None.

    Raises:
        ValueError: `url` is none.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        max_retries: int,
        dead: Callable[[], str | None] = lambda: None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _CONNECTIONS or not parts.hostname:
            raise ValueError(
                f"VLLMServerRollout.url={url!r} is no address of a server: write it as in "
                "http://127.0.0.1:8000."
            )
        self.url, self.timeout, self.max_retries = url.rstrip("/"), timeout, max_retries
        self.dead = dead

    def get(self, path: str) -> Any:
        return self.ask("GET", path)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The answer, as JSON where it is JSON.

        Raises:
            RefusedError: the server says that the request is wrong.
            RuntimeError: there was no answer after all repetitions.
        """
        for attempt in range(self.max_retries + 1):
            if attempt:
                time.sleep(_PAUSE * 2 ** (attempt - 1))
            if reason := self.dead():
                raise RuntimeError(reason)
            try:
                status, said = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                failure = f"{type(error).__name__}: {error}".removesuffix(": ")
                continue
            if status < 400:
                return _parsed(said)
            told = _message(said)
            if status < 500 and status not in _LATER:
                is_missing = status == 404 and told == "Not Found" and path in _OFFERED
                how = f"start it with {_OFFERED[path]}" if is_missing else "look at its log"
                raise RefusedError(
                    f"the vLLM server at {self.url} refuses {path} (status {status}: {told}): "
                    f"{how}.",
                    status,
                )
            failure = f"status {status}: {told}"
        if reason := self.dead():
            raise RuntimeError(reason)
        raise RuntimeError(
            f"the vLLM server at {self.url} fails at {path}, asked {self.max_retries + 1} times "
            f"with a timeout of {self.timeout:g} s ({failure}): see whether it runs."
        )

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        connection = _CONNECTIONS[parts.scheme](parts.hostname, parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):  # as the server itself reads it
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, parts.path + path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()


def _parsed(said: str) -> Any:
    try:
        return json.loads(said)
    except ValueError:
        return said


def _message(said: str) -> str:
    """The first line of the server's complaint."""
    found = _parsed(said)
    if isinstance(found, dict):
        inner = found.get("error", found.get("detail", found))
        found = inner.get("message", inner) if isinstance(inner, dict) else inner
    lines = str(found).strip().splitlines()
    return lines[0] if lines else "no reason given"
