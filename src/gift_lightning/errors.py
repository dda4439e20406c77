"""What a user reads when something is wrong: one sentence that names the key and the way out."""

import re
import traceback

from gift_lightning.references import Reference
from gift_lightning.target import Target

_CHOICES: dict[str, type] = {"target": Target, "reference": Reference}


def own_error(error: BaseException | None) -> BaseException | None:
    """The ValueError or RuntimeError that this package raised, inside whatever wrapped it."""
    while error is not None:
        frames = list(traceback.walk_tb(error.__traceback__))
        module = frames[-1][0].f_globals.get("__name__", "") if frames else ""
        if isinstance(error, ValueError | RuntimeError) and module.startswith("gift_lightning"):
            return error
        error = error.__cause__ or error.__context__
    return None


def one_sentence(message: str) -> str:
    """The innermost complaint of jsonargparse's nested message, behind the key it is about."""
    key = ".".join(re.findall(r'(?:Parser key|key) "([^"]+)"', message))
    where = f"{key}: " if key else ""
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"{where}{unknown[1]!r} names no class{_choices(key)}."
    if refused := re.search(r"Option '([^']+)' is not accepted", message):
        owner = re.findall(r"given class_path '([^']+)'", message)
        of = f" of {owner[-1].rpartition('.')[2]}" if owner else ""
        return (
            f"{where}{refused[1]!r} is no option{of}; see `--{key}.help {owner[-1]}`."
            if owner
            else f"{where}{refused[1]!r} is no option."
        )
    lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
    noise = (
        "Does not validate",
        "Expected a path but",
        "Subtypes:",
        "Errors:",
        "Given value",
        "Problem with given",
        "Parser key",
        "Expected a <class 'NoneType'>",
    )
    telling = [line for line in lines if not line.startswith(noise)]
    said = telling[0] if telling else lines[0]
    said = re.sub(r"Expected a <class '([^']+)'>. Got value: (.*)", r"expected \1, got \2", said)
    said = re.sub(r"Expected a typing.Literal\[(.*)\]. Got value: (.*)", r"choose \1, not \2", said)
    return f"{where}{said.removesuffix('.')}."


def _choices(key: str) -> str:
    if key == "model.model":
        return ": choose gift_lightning.models.causal_lm or gift_lightning.models.tiny_llama"
    root = _CHOICES.get(key.rpartition(".")[2])
    if root is None:
        return ""
    names: set[str] = set()
    pending = [root]
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        if cls.__module__.startswith("gift_lightning") and not cls.__name__.startswith("_"):
            names.add(cls.__name__)
    names -= {root.__name__, "OldPolicy"}
    return f": choose {', '.join(sorted(names))}, or the dotted path of one of your own"
