"""What a user reads when something is wrong: one sentence that names the key and the way out."""

import argparse
import dis
import re
import sys
from pathlib import Path
from typing import NoReturn

import yaml

from gift_lightning.references import Reference
from gift_lightning.target import Target

_CHOICES: dict[str, type] = {"target": Target, "reference": Reference}


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong as the rest of `gift` does: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"gift: error: {message}; see `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def own_error(error: BaseException | None) -> BaseException | None:
    """The ValueError or RuntimeError that this package raised, inside whatever wrapped it."""
    while error is not None:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        if last is not None and isinstance(error, ValueError | RuntimeError):
            frame = last.tb_frame
            # By a `raise` of ours: torch raises in our frames too.
            raised = frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
            if raised and frame.f_globals.get("__name__", "").startswith("gift_lightning"):
                return error
        error = error.__cause__ or error.__context__
    return None


def refuse_repeated_keys(path: str) -> None:
    """Raises ValueError if a YAML file says a key twice, of which the last would silently win."""

    def walk(node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                line = key.start_mark.line + 1
                if key.value in seen:
                    raise ValueError(
                        f"{path}:{line}: {key.value!r} stands here and in line {seen[key.value]}: "
                        "keep one of them."
                    )
                seen[key.value] = line
                walk(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                walk(value)

    if Path(path).is_file():  # a missing one is the parser's to name
        try:
            root = yaml.compose(Path(path).read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            return  # likewise
        if root is not None:
            walk(root)


def one_sentence(message: str) -> str:
    """The innermost complaint of jsonargparse's nested message, behind the key it is about."""
    key = ".".join(re.findall(r'(?:Parser key|key) "([^"]+)"', message))
    where = f"{key}: " if key else ""
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        return f"{where}{unknown[1]!r} names no class{_choices(key)}."
    if missing := re.search(r"callable class: No module named '([^']+)'", message):
        return f"{where}{missing[1]!r} is not installed."
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
