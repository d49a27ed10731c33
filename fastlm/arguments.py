"""Typed dataclasses from command lines and YAML files, with errors that name key, value and remedy.

jsonargparse converts one value to one type; around it stands what it does not give: no abbreviated flags,
the nearest valid name in every refusal, finite numbers, and one line of error in place of a usage dump.
A dataclass's comments are its help: `lr: float = 0.03  # the matrices' rate` documents `--optim.lr`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from fastlm.errors import InputError, show

T = TypeVar("T")
Values = dict[str, object]  # dotted key -> value


@dataclass(frozen=True)
class Leaf:
    """One setting: a field of a dataclass or of one of its sections."""

    key: str  # dotted, as in optim.lr
    hint: Any
    default: object  # dataclasses.MISSING where the user must give it


@functools.cache
def leaves(cls: type) -> dict[str, Leaf]:
    """Every setting of dataclass `cls`, nested sections included, by dotted key in order of definition."""
    hints = typing.get_type_hints(cls)
    found: dict[str, Leaf] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            inner = leaves(hint).values()
            found |= {
                f"{field.name}.{leaf.key}": Leaf(f"{field.name}.{leaf.key}", leaf.hint, leaf.default) for leaf in inner
            }
            continue
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        found[field.name] = Leaf(field.name, hint, default)
    return found


def comments(cls: type) -> dict[str, str]:
    """The comment behind each setting, by dotted key; empty where the source is not at hand."""
    try:
        found = dict(re.findall(r"^ +(\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    except OSError:
        return {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            found |= {f"{name}.{key}": comment for key, comment in comments(hint).items()}
    return found


def parse_arguments(cls: type[T], argv: Sequence[str], *, command: str, positional: str | None = None) -> T:
    """Fill dataclass `cls` from `argv`: `--key value` or `--key=value`, dotted keys for nested sections.

    `command` is the module that the user ran, as in `fastlm.generate`. `positional` names the field that is
    given without a flag, a run directory for one. `--help` prints and exits with 0. Raises InputError.
    """
    fields = leaves(cls)
    flags = read_flags(argv, fields, positional=positional)
    if "help" in flags:
        sys.stdout.write(help_text(cls, command, positional))
        raise SystemExit(0)
    values = {key: convert(fields[key], text) for key, text in flags.items()}
    return build(cls, values, command=command, positional=positional)


def read_flags(
    argv: Sequence[str],
    fields: Mapping[str, Leaf],
    *,
    positional: str | None = None,
    options: Iterable[str] = (),
    switches: Iterable[str] = ("help",),
) -> dict[str, str]:
    """Split a command line into {dotted key: text}; the last of two equal flags wins.

    `options` are names beside `fields` that take a value, `switches` names that take none (they map to "").
    Raises InputError for an unknown flag, a flag without a value and a word that belongs to no flag.
    """
    switches, known = list(switches), [*fields, *options]
    found: dict[str, str] = {}
    last = ""  # the flag before the word at hand, for the error about a stray word
    words = ["--help" if word == "-h" else word for word in argv]
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if re.match(r"-[A-Za-z]", word):
            raise InputError(word, "no value", "no such option; options start with --, see --help")
        if not word.startswith("--"):
            if positional is None or positional in found:
                raise _stray_word(word, last, fields)
            found[positional] = word
        elif name in switches and not equals:
            found[name] = ""
        elif name not in known or name == positional:
            value = text if equals else (words[0] if words and not words[0].startswith("--") else None)
            raise unknown_key(name, value, [*known, *switches], fields, flag=True)
        elif equals:
            found[name], last = text, name
        elif not words or words[0].startswith("--"):
            raise InputError(f"--{name}", "no value", f"write --{name} VALUE, or --{name}=VALUE")
        else:
            found[name], last = words.pop(0), name
    return found


def _stray_word(word: str, last: str, fields: Mapping[str, Leaf]) -> InputError:
    flag = next((f"--{key}" for key in fields if key.split(".")[-1] == "path"), "--KEY")
    if not last:
        return InputError("argument", word, f"options are written --KEY VALUE; did you mean {flag} {word}?")
    remedy = f"--{last} takes one value: put text with spaces in quotes, write a list as [a,b]"
    return InputError("argument", word, f"{remedy}; or did you mean {flag} {word}?")


def unknown_key(
    name: str,
    value: object,
    known: Iterable[str],
    fields: Mapping[str, Leaf],
    *,
    flag: bool,
    file: str | None = None,
) -> InputError:
    """The error about a key that does not exist, with the nearest one that does."""
    near = nearest_key(name, known, fields)
    if flag:
        example = f"--{near}" + (f" {show(value)}" if name in _sections(fields) and value else "")
        remedy = f"no such option; did you mean {example}?" if near else "no such option; see --help"
        return InputError(f"--{name}", "no value" if value is None else value, remedy)
    remedy = f"no such key; did you mean {near}?" if near else "no such key; see --help"
    return complaint(name, value, remedy, file)


def nearest_key(name: str, known: Iterable[str], fields: Mapping[str, Leaf]) -> str | None:
    """The valid key that was probably meant: a section's first, one of the same last word, or alike."""
    if name in _sections(fields):
        return next(key for key in fields if key.startswith(f"{name}."))
    known = list(known)
    last = name.split(".")[-1]
    same = [key for key in known if key == name or key.split(".")[-1] == last]
    if same:
        return same[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not near:
        by_last = {key.split(".")[-1]: key for key in reversed(known)}
        near = [by_last[word] for word in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return near[0] if near else None


def _sections(fields: Mapping[str, Leaf]) -> list[str]:
    return list(dict.fromkeys(key.rpartition(".")[0] for key in fields if "." in key))


def complaint(key: str, value: object, remedy: str, file: str | None = None) -> InputError:
    """An InputError about a key's value: as a flag, or as a key of `file`."""
    if file is None:
        return InputError(f"--{key}", value, remedy)
    return InputError(key, value, f"{remedy} (in {file})")


def convert(leaf: Leaf, value: object, file: str | None = None) -> object:
    """`value`, typed text or what YAML made of it, as `leaf.hint` wants it. Raises InputError."""
    import jsonargparse

    if value is None or (isinstance(value, str) and value in ("null", "~") and _allows(leaf.hint, type(None))):
        if _allows(leaf.hint, type(None)):
            return None
        raise complaint(leaf.key, None, remedy(leaf.hint, value), file)
    if isinstance(value, str) and _allows(leaf.hint, str):
        return value  # as typed: a file may be called 7, true or #1
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=leaf.hint)
    try:
        result = parser.parse_object({"value": value}, defaults=False)["value"]
    except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
        raise complaint(leaf.key, value, remedy(leaf.hint, value), file) from error
    numbers = result if isinstance(result, tuple | list) else (result,)
    if any(isinstance(x, float) and not math.isfinite(x) for x in numbers):
        raise complaint(leaf.key, value, "give a finite number", file)
    return result


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; the hint itself where it is none."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _allows(hint: Any, kind: type) -> bool:
    return kind in _members(hint)


def choices(hint: Any) -> list[str]:
    """The words that a hint's Literals and booleans allow, as typed on a command line."""
    words: list[str] = []
    for member in _members(hint):
        if typing.get_origin(member) is Literal:
            words += [show(word) for word in typing.get_args(member)]
        elif member is bool:
            words += ["true", "false"]
    return words


def remedy(hint: Any, value: object) -> str:
    """What to write instead of `value` where `hint` is wanted."""
    off = ", or null for off" if _allows(hint, type(None)) else ""
    words = choices(hint)
    if words and _allows(hint, int) and value not in words:
        return f"give a whole number, or {' or '.join(words)}"
    if words:
        near = difflib.get_close_matches(show(value).lower(), words, n=1, cutoff=0.5)
        guess = f"; did you mean {near[0]}?" if near else ""
        return f"choose one of {', '.join(words)}{off}{guess}"
    if _allows(hint, int):
        return f"give a whole number{off}"
    if _allows(hint, float):
        return f"give a number{off}"
    if _allows(hint, str):
        return f"give a text, in quotes{off}"
    count = len(typing.get_args(_members(hint)[0]))
    return f"give a list of {count} numbers, as in [{', '.join(['0.9', '0.95', '0.99'][:count])}]{off}"


def build(cls: type[T], values: Mapping[str, object], *, command: str = "", positional: str | None = None) -> T:
    """Dataclass `cls` from converted values by dotted key; absent ones keep their defaults."""
    for key, leaf in leaves(cls).items():
        if leaf.default is dataclasses.MISSING and key not in values:
            if key == positional:
                raise InputError(key.upper(), "nothing", f"name it, as in python -m {command} {key.upper()}")
            raise InputError(f"--{key}", "nothing", f"write --{key} VALUE")
    return _build(cls, values, "")


def _build(cls: type[T], values: Mapping[str, object], prefix: str) -> T:
    hints, given = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            given[field.name] = _build(hint, values, f"{key}.")  # type: ignore[arg-type]
        elif key in values:
            given[field.name] = values[key]
    return cls(**given)


def flatten(options: object) -> Values:
    """A filled dataclass as {dotted key: value}: `build`'s inverse."""
    found: Values = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            found[field.name] = value
    return found


def read_yaml(path: Path, fields: Mapping[str, Leaf]) -> Values:
    """A YAML file's settings by dotted key, converted; nested sections and dotted keys may be mixed.

    Raises InputError naming the file for one that is missing, no text, no YAML, or holds an unknown key, the
    same key twice or a value of the wrong type.
    """
    raw: Values = {}
    _flatten_yaml(_load_yaml(path), "", fields, raw, str(path))
    return {key: convert(fields[key], value, str(path)) for key, value in raw.items()}


def _load_yaml(path: Path) -> dict[Any, Any]:
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        loaded = yaml.load(text, Loader=_strict_loader())
    except OSError as error:
        raise InputError("--config", path, f"name a readable YAML file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError("--config", path, "give a YAML file in UTF-8") from error
    except (TypeError, RecursionError) as error:
        raise InputError("--config", path, "give a YAML file of KEY: VALUE lines, keys as words") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InputError("--config", path, f"not valid YAML, {where}{problem}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise InputError("--config", path, "give a YAML file of KEY: VALUE lines")
    return loaded


def _strict_loader() -> Any:
    """PyYAML's safe loader, but a key given twice in one mapping is an error instead of silently the last."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value} stands here a second time"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(str(key_node.value))
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _flatten_yaml(tree: dict[Any, Any], prefix: str, fields: Mapping[str, Leaf], into: Values, file: str) -> None:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in fields:
            if key in into:
                raise complaint(key, value, "the key stands here a second time", file)
            into[key] = value
        elif key in _sections(fields) and (value is None or isinstance(value, dict)):
            _flatten_yaml(value or {}, f"{key}.", fields, into, file)
        else:
            raise unknown_key(key, value, [*_sections(fields), *fields], fields, flag=False, file=file)


def help_text(cls: type, command: str, positional: str | None = None, extra: str = "") -> str:
    """One line a setting, grouped by section: flag, default, meaning. `extra` goes before the settings."""
    lines = [
        f"usage: python -m {command}" + (f" {positional.upper()}" if positional else "") + " [--KEY VALUE ...]",
        "",
    ]
    lines += [inspect.cleandoc(cls.__doc__ or "").partition("\n")[0], ""]
    lines += extra.splitlines()
    section, meanings = "", comments(cls)
    for key, leaf in leaves(cls).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += [""]
        default = leaf.default
        name = key.upper() if key == positional else f"--{key}"
        shown = "required" if default is dataclasses.MISSING else _yaml_value(default)
        meaning = "; ".join(part for part in (" | ".join(choices(leaf.hint)), meanings.get(key)) if part)
        lines.append(f"  {name:<24} {shown:<14} {meaning}".rstrip())
    return "\n".join(lines) + "\n"


def _yaml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(_yaml_value(x) for x in value)}]"
    return show(value)
