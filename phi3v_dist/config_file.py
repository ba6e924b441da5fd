"""A YAML file and `key=value` words → plain data → validated settings, and a message for every mistake in them.

What comes in: a path, words, and a settings class. What goes out: the settings, and messages that name the key, the
value and the way out. Surprise: validation is repeated. Bad values are deleted after each round, so that defaults stand
in for them and the rest can be looked at; what would only follow from a deletion is not reported.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from phi3v_dist import resources
from phi3v_dist.errors import ConfigError

SectionT = TypeVar("SectionT", bound=BaseModel)
UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError)  # as a YAML file or value


def merge(path: Path | None, overrides: Sequence[str], option: str = "--config") -> tuple[dict[str, Any], list[str]]:
    """The file's tree with the overrides in it, and a message for each word that is no override.

    Args:
        path: None for a tree of the overrides alone.
        option: of the command line, that named the file.

    Raises:
        ConfigError: the file is missing or is not YAML with sections.
    """
    if path and not path.is_file():
        raise ConfigError(f"{option} {path}: no such file{resources.suggestion(path, 'configs')}")
    problems: list[str] = []
    try:
        merged = OmegaConf.load(path) if path else OmegaConf.create()
        for word in overrides:
            try:
                key, _, text = key_values([word])[0].partition("=")
                value = OmegaConf.from_dotlist([f"value={text}"])["value"]
                OmegaConf.update(merged, key, value)  # it reaches into lists too: data.train.0.weight=2
            except ConfigError as error:
                problems += error.problems
            except UNREADABLE as error:
                problems.append(f"override {word!r} cannot be applied: {str(error).splitlines()[0]}")
        tree: Any = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections such as `model:` and `data:`, found {type(tree).__name__}")
    return tree, problems


def key_values(words: Sequence[str]) -> list[str]:
    """The words, when each is `key=value`; else ConfigError naming those that are not."""
    if malformed := [word for word in words if "=" not in word.lstrip("=")]:
        raise ConfigError([f"override {word!r} is not key=value, for example train.steps=100" for word in malformed])
    return list(words)


def validate(section: type[SectionT], tree: dict[str, Any]) -> tuple[SectionT | None, list[str]]:
    """The section from what is right in the tree, and a message for each thing that is not.

    Bad values are deleted from `tree`, so that their defaults take their place; None when one without a default is
    missing then.
    """
    problems: list[str] = []
    removed: list[tuple[int | str, ...]] = []
    while True:  # each round removes every bad key found; what remains wrong after that is a missing one
        try:
            return section.model_validate(tree), problems
        except ValidationError as error:
            known, before, found = sorted(_known_keys(section)), len(removed), []
            for mistake in reversed(error.errors()):  # of a list the last first, so that the others keep their places
                loc = tuple(part for part in mistake["loc"] if part != "[key]")  # pydantic's word for a dict's key
                if not any(gone[: len(loc)] == loc for gone in removed):  # else it follows from what was removed
                    found.append(describe(mistake | {"loc": loc}, known))
                if mistake["type"] != "missing" and _remove(tree, loc):
                    removed.append(loc)
            problems += reversed(found)
            if len(removed) == before:
                return None, problems


def describe(mistake: Any, known: list[str]) -> str:
    """One entry of `ValidationError.errors()` in words. known: all dotted keys."""
    key = ".".join(str(part) for part in mistake["loc"])
    if mistake["type"] == "extra_forbidden":
        return f"`{key}` is not a setting{_suggestion([str(part) for part in mistake['loc']], known)}"
    if mistake["type"] == "missing":
        return f"`{key}` is missing: give it in the YAML file or as {key}=…"
    value = repr(mistake["input"])
    wants_text = mistake["type"] in ("string_type", "path_type") and isinstance(mistake["input"], int | float)
    quote = " (YAML takes it for a number or for true or false; quote it to keep text)" if wants_text else ""
    shown = value if len(value) <= 80 else f"{value[:80]}…"
    return f"`{key}` is {shown}: {mistake['msg'][0].lower()}{mistake['msg'][1:]}{quote}"


def _suggestion(loc: list[str], known: list[str]) -> str:
    """The key that was probably meant: one of like name beside it, else elsewhere; else what there is beside it."""
    *parents, last = loc
    beside: dict[str, str] = {}
    elsewhere: dict[str, str] = {}
    for key in known:
        *above, name = key.split(".")
        if len(above) == len(parents) and all(a in ("*", p) for a, p in zip(above, parents, strict=True)):
            beside[name] = ".".join([*parents, name])
        elif "*" not in above:
            elsewhere.setdefault(name, key)
    for names in (beside, elsewhere):
        if near := difflib.get_close_matches(last, names, n=1):
            return f"; did you mean `{names[near[0]]}`?"
    return f"; `{'.'.join(parents)}` knows {', '.join(beside)}" if parents and beside else ""


def _remove(tree: Any, loc: tuple[int | str, ...]) -> bool:
    """Delete the value at `loc`; False when it is not there to delete."""
    *parents, last = loc
    try:
        for part in parents:
            tree = tree[part]
        del tree[last]
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _known_keys(section: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of a section and those inside it; `*` stands for the place in a list and for a key of one's own."""
    keys = set()
    for name, field in section.model_fields.items():
        keys.add(prefix + name)
        inner, inside = field.annotation, f"{prefix}{name}."
        if get_origin(inner) in (list, dict):
            inner, inside = get_args(inner)[-1], f"{inside}*."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys |= _known_keys(inner, inside)
    return keys


def with_lines(messages: Sequence[str], path: Path, overrides: Sequence[str]) -> list[str]:
    """The messages, each that begins with a key of the file followed by file and line; not when a word overrides it."""
    given = {word.partition("=")[0].replace("[", ".").replace("]", "") for word in overrides}
    lines = _lines(yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader))
    said = []
    for message in messages:
        key = message.split("`")[1] if message.startswith("`") else ""
        overridden = any(key == word or key.startswith(f"{word}.") for word in given)
        said.append(f"{message} ({path}:{lines[key]})" if key in lines and not overridden else message)
    return said


def _lines(node: yaml.Node | None, key: str = "") -> dict[str, int]:
    """Dotted key → line of the file, from 1."""
    found: dict[str, int] = {}
    inner: list[tuple[str, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(name.value), name, value) for name, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(place), value, value) for place, value in enumerate(node.value)]
    for name, at, value in inner:
        dotted = f"{key}.{name}".lstrip(".")
        found |= {dotted: at.start_mark.line + 1} | _lines(value, dotted)
    return found


def flattened(tree: Any, key: str = "") -> dict[str, Any]:
    """Plain data as `{dotted key: value}`; an empty list or section is a value."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    parts = {name: part for at, value in inner for name, part in flattened(value, f"{key}.{at}".lstrip(".")).items()}
    return parts or {key: tree}
