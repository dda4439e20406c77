"""Keyed random streams: nothing that is drawn depends on what was drawn before it."""

import hashlib


def keyed_seed(seed: int, purpose: str, *key: int | str) -> int:
    """One random stream per purpose: a 63-bit seed that depends on all arguments.

    The built-in `hash` varies between processes, so the sha256 of the arguments' `repr` is used.
    """
    digest = hashlib.sha256(repr((seed, purpose, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
