"""Compressors by name: for the command line, YAML, hub JSON and lists."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_args, overload

import mmtoken.compressors as shelf
from mmtoken.compressors.base import SITES, Compressor, Positions
from mmtoken.compressors.compose import Composition, Schedule, Sequential
from mmtoken.compressors.trained import Trained
from mmtoken.errors import MMTokenError, UnknownNameError, near_names

COMPRESSORS: tuple[type[Compressor], ...] = tuple(
    sorted(
        (
            kind
            for kind in vars(shelf).values()
            if isinstance(kind, type)
            and issubclass(kind, Compressor)
            and kind is not Compressor
            and not issubclass(kind, Composition)
        ),
        key=lambda kind: kind.control,
    )
)
"""What `mmtoken.compressors` imports: methods, then controls."""


COMPOSITIONS: dict[str, type[Compressor]] = {"sequential": Sequential, "schedule": Schedule}
"""Compressors made of others, by name; they have no line of their own in lists of methods."""


def names() -> dict[str, type[Compressor]]:
    """Classes by the name that people type: the class name in lower case."""
    return {cls.__name__.lower(): cls for cls in COMPRESSORS}


@overload
def resolve(spec: Compressor | str | dict[str, Any], **settings: Any) -> Compressor: ...
@overload
def resolve(spec: Trained, **settings: Any) -> Trained: ...
@overload
def resolve(spec: Compressor | Trained | str | dict[str, Any], **settings: Any) -> Compressor | Trained: ...
def resolve(spec: Compressor | Trained | str | dict[str, Any], **settings: Any) -> Compressor | Trained:
    """A compressor from whatever names one.

    Args:
        spec: an instance, with or without learned parts; a name ("fastv", "uniform-grid"); a dotted class path; or
            {"class_path": ..., "init_args": {...}} as in YAML and hub JSON. A class outside mmtoken is found only if
            its module has been imported already: a name in a file never imports code.
        **settings: settings that go on top.

    Raises:
        UnknownNameError: no compressor has this name; the message lists near ones.
        MMTokenError: a setting is unknown, missing or out of range.
    """
    if isinstance(spec, Trained):
        return Trained(resolve(spec.compressor, **settings), spec.module, spec.dims) if settings else spec
    if isinstance(spec, Compressor):
        return _make(type(spec), {**spec.settings(), **settings}) if settings else spec
    if isinstance(spec, str):
        return _make(_find(spec), settings)
    if not isinstance(spec, dict) or not isinstance(spec.get("class_path"), str):
        raise MMTokenError(
            f"compressor={spec!r}: give an instance, a name, or a dict with 'class_path' and 'init_args'."
        )
    unknown = set(spec) - {"class_path", "init_args"}
    arguments = spec.get("init_args") or {}
    if unknown or not isinstance(arguments, dict):
        raise MMTokenError(f"compressor={spec!r} has entries other than 'class_path' and 'init_args' (a dict).")
    return _make(_find(spec["class_path"]), {**arguments, **settings})


def _find(name: str) -> type[Compressor]:
    module, _, last = name.rpartition(".")
    if not module or module == "mmtoken.compressors" or module.startswith("mmtoken.compressors."):
        word = last.lower().replace("-", "").replace("_", "")
        found = names().get(word, COMPOSITIONS.get(word))
        if found is None:
            raise UnknownNameError(f"compressor={name!r} is unknown{near_names(last, names())}")
        return found
    loaded = sys.modules.get(module)
    # Not getattr: modules that load their parts lazily would import code for a name in a file.
    cls = None if loaded is None else vars(loaded).get(last)
    if not isinstance(cls, type) or not issubclass(cls, Compressor) or not dataclasses.is_dataclass(cls):
        raise UnknownNameError(
            f"class_path={name!r} is no Compressor of a module that is imported; import it first"
            f"{near_names(last, names())}"
        )
    return cls


def _make(cls: type[Compressor], settings: dict[str, Any]) -> Compressor:
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for name in settings:
        if name not in fields:
            raise MMTokenError(
                f"{name}={settings[name]!r} is no setting of {cls.__name__}{near_names(str(name), fields)}"
            )
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in settings:
            example = "[...], a list of compressors" if name in cls.nested else "0.25"
            raise MMTokenError(
                f"{name} is missing: {cls.__name__} has no default for it; give for example {name}={example}."
            )
    for name in cls.nested:
        given = settings.get(name)
        if isinstance(given, list | tuple):
            settings = {**settings, name: tuple(part if isinstance(part, Trained) else resolve(part) for part in given)}
    return cls(**settings)


def facts() -> list[dict[str, str]]:
    """One row per compressor from the facts on its class, for lists and tables."""
    return [facts_of(name, cls) for name, cls in names().items()]


def facts_of(name: str, cls: type[Compressor]) -> dict[str, str]:
    """The facts of one class as words; every class has the same ones."""
    default = next(field.default for field in dataclasses.fields(cls) if field.name == "positions")  # type: ignore[arg-type]
    choices = sorted(get_args(Positions), key=lambda choice: choice != default)
    return {
        "name": name,
        "title": cls.title,
        "kind": "control" if cls.control else "method",
        "year": str(cls.year),
        "sites": ", ".join(site for site in SITES if site in cls.sites),
        "needs": ", ".join(sorted(cls.needs)) or "features only",
        "sees the question": _yes(not cls.query_agnostic),
        "streaming-legal": _yes(cls.causal and (cls.query_agnostic or cls.sites == {"retrieve"})),
        "trainable": _yes(cls.trainable),
        "budget": cls.budget.replace("_", " "),
        # Entries of a cache have their positions already.
        "positions": str(default) if cls.sites == {"cache"} else " or ".join(choices),
        "keep=1.0": "bit-identical" if cls.identity_at_full is True else str(cls.identity_at_full),
        "parity": cls.parity,
        "cost": cls.cost,
        "licence": cls.licence,
        "paper": cls.paper,
    }


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
