"""What every test shares: shapes are really checked, nothing leaves the machine."""

import multiprocessing
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from jaxtyping import config, install_import_hook

REPOSITORY = Path(__file__).parents[1]

# They say PreTrainedModel, which a PeftModel stands in for without being one; countdown has no
# tensors and millions of calls.
UNCHECKED = {
    "countdown",
    "models",
    "policy",
    "sft",
    "module",
    "grpo",
    "hybrid",
    "imitation",
    "onpolicy",
    "collector",
    "export",
    "rollouts",
    "generation",
    "quantization",
    "vllm_checks",
    "vllm_colocate",
    "vllm_rollouts",
    "vllm_weights",
}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, with int for float as in PEP 484, and without Protocols of static checkers."""
    try:
        return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    except BeartypeDecorHintPep3119Exception:
        return function


def _check_annotations() -> None:
    """The shapes and types in the package's annotations are checked at every call."""
    assert "gift_lightning" not in sys.modules, "the hook must come before the package"
    modules = (x.stem for x in (REPOSITORY / "src" / "gift_lightning").glob("*.py"))
    names = [f"gift_lightning.{x}" for x in modules if x not in UNCHECKED]
    install_import_hook(names, f"{__name__}.checked")


_check_annotations()

os.environ["GIFT_CACHE"] = ""  # no test reads what a user or another test left
os.environ["HF_HUB_OFFLINE"] = "1"
IMPORTED = ("cli", "hybrid", "hybrid_data", "evaluation", "sharding")  # and what these import
multiprocessing.set_forkserver_preload([f"gift_lightning.{name}" for name in IMPORTED])
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


# Files that take minutes start first, so that no process is left with them at the end.
SLOW = (
    "smollm2",
    "sharding",
    "readme",
    "vllm",
    "grpo",
    "plan",
    "ablate",
    "benchmarks",
    "hybrid",
    "configs",
)


# Checking annotations takes longer than what it checks: in the first case of a test, and in every
# seventh of the others, chosen by its name so that each test checks other parameters.
EVERY = 7
_unchecked = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": i for i, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    begun: set[str] = set()
    for item in items:
        test = item.nodeid.partition("[")[0]
        item.stash[_unchecked] = test in begun and zlib.crc32(item.nodeid.encode()) % EVERY > 0
        begun.add(test)


@pytest.fixture(autouse=True)
def _annotations(request: pytest.FixtureRequest) -> Iterator[None]:
    config.update("jaxtyping_disable", request.node.stash[_unchecked])
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and real data that lies beside the repository."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no reference numbers or data here: {folder} is missing")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with a real pretrained model."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = os.environ.get("GIFT_SMOLLM2")
    if not folder:
        pytest.skip(f"no real model: set GIFT_SMOLLM2 to the folder that holds {name}")
    if not (Path(folder) / name).is_file():
        pytest.skip(f"no real model: GIFT_SMOLLM2={folder} does not hold {name}")
    return Path(folder)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """A run in several processes leaves its port in the environment, which the next would take."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def _is_here(family: int, address: object) -> bool:
    if family == getattr(socket, "AF_UNIX", None):
        return True
    host = address[0] if isinstance(address, tuple) else address
    return host in ("localhost", "::1", "0.0.0.0") or str(host).startswith("127.")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for the network fails, instead of passing only where there is one."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: object) -> None:
        if not _is_here(self.family, address):
            raise OSError(f"tests use no network, but something connects to {address}")
        connect(self, address)

    def guarded_lookup(host: object, *args: object, **kwargs: object) -> object:
        if host is not None and not _is_here(0, host):
            raise OSError(f"tests use no network, but something looks up {host!r}")
        return lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_lookup)
