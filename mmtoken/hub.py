"""Load a model with its processor, and save it together with the compressor that is attached to it.

Weights are read from safetensors only, and no code from a repository runs unless the caller says so.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mmtoken import __version__
from mmtoken.backbones.registry import adapt, check_model_type
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained
from mmtoken.engine.learned import empty
from mmtoken.engine.session import attach, attached
from mmtoken.errors import CheckpointError, MMTokenError, UnsupportedError, near_names
from mmtoken.models import llava_video as llava_video  # makes transformers' Auto classes know it
from mmtoken.models import openvla as openvla  # the same
from mmtoken.models.registry import DEFAULT, ZooModel, find_model, list_models
from mmtoken.wholefile import whole_folder

__all__ = ["COMPRESSOR_FILE", "ZooModel", "list_models", "load", "save", "skeleton"]

COMPRESSOR_FILE = "mmtoken_compressor.json"
"""Beside a model's config: {"schema_version", "mmtoken_version", "class_path", "init_args"}."""

PARTS_FILE = "mmtoken_compressor.safetensors"
"""Beside that file, if the compressor has learned parts: their weights."""

SCHEMA_VERSION = 1

_DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only", "force_download")

_logger = logging.getLogger(__name__)


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    compressor: Compressor | Trained | str | dict[str, Any] | None = None,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A vision-language model, ready to generate, and its processor.

    A compressor given here, or saved with the model, comes attached; `mmtoken.attached(model)` is its session.

    Args:
        name_or_path: a zoo entry ("tiny-llava", the default), a folder, or a Hugging Face id ("org/name").
        compressor: an instance, a name, or {"class_path": ..., "init_args": ...}; goes before a saved one.
        **hf_kwargs: go to `from_pretrained` (dtype, device_map, attn_implementation, revision, token, ...).

    Raises:
        UnknownNameError: no zoo entry, folder or id of this name.
        UnsupportedError: the model's family has no adapter, or cannot host the compressor.
        CheckpointError: files are missing, corrupt, do not fit together, or hold pickles instead of safetensors.
    """
    source, options = _locate(DEFAULT if name_or_path is None else os.fspath(name_or_path), dict(hf_kwargs))
    _check_family(source, options)
    with _readable(source):
        AutoConfig.from_pretrained(source, **_fetching(options))  # refuses code and settings out of range early
    chosen = None if compressor is None else resolve(compressor)
    saved = _saved_compressor(source, options) if compressor is None else None
    _refuse_pickles(source)
    with _readable(source):
        # With output_loading_info a pair comes back, which its annotation does not say.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, **{**options, "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        )
    model: PreTrainedModel = loaded[0]
    # transformers fills tensors that are missing or of another shape with random numbers and logs a warning.
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise CheckpointError(
            f"model={source!r} lacks {len(missing)} tensors, {missing[0]} among them; the checkpoint is incomplete, "
            "fetch or export it again."
        )
    misshapen = sorted(loaded[1]["mismatched_keys"], key=lambda entry: str(entry[0]))
    if misshapen:
        name, found, wanted = misshapen[0]
        raise CheckpointError(
            f"model={source!r} cannot be loaded: {name} is {list(found)} and config.json asks for {list(wanted)} "
            f"({len(misshapen)} tensors do not fit); fetch or export it again."
        )
    processor = _processor(source, options)
    model.eval()
    if saved is not None:
        chosen = _with_parts(model, saved, source, options) if saved.trainable else saved
    if chosen is not None:
        attach(model, chosen)
    return model, processor


def skeleton(
    name_or_path: str | os.PathLike[str] | None = None, **hf_kwargs: Any
) -> tuple[PreTrainedModel, Compressor | None]:
    """The model without its weights, on the meta device, and the compressor saved with it, not attached.

    Enough to ask which compressors fit, without fetching gigabytes. Arguments and errors are those of `load`.
    """
    source, options = _locate(DEFAULT if name_or_path is None else os.fspath(name_or_path), dict(hf_kwargs))
    _check_family(source, options)
    with _readable(source):
        config = AutoConfig.from_pretrained(source, **_fetching(options))
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=options["trust_remote_code"])
    return model.eval(), _saved_compressor(source, options)


def load_processor(name_or_path: str | os.PathLike[str] | None = None, **hf_kwargs: Any) -> ProcessorMixin:
    """The processor of a model alone. Arguments and errors are those of `load`."""
    source, options = _locate(DEFAULT if name_or_path is None else os.fspath(name_or_path), dict(hf_kwargs))
    _check_family(source, options)
    return _processor(source, options)


def _locate(name: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or Hugging Face id, and the arguments of `from_pretrained`."""
    # None would make transformers ask on the terminal.
    options.setdefault("trust_remote_code", False)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return str(path), {**options, "local_files_only": True}
    if name and path.exists():
        raise CheckpointError(f"model={name!r} is a file; give the folder that holds config.json and the weights.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(
            f"model={name!r} does not exist; give a folder, a Hugging Face id or a zoo entry"
            f"{near_names(name, [entry.name for entry in list_models()])}."
        )
    if name.count("/") == 1:
        if not options.get("local_files_only") and not _hub_answers():
            options["local_files_only"] = True
        return name, options
    return str(find_model(name).path), {**options, "local_files_only": True}


def _hub_answers() -> bool:
    """Whether the hub's name can be looked up. Without a network, retries would take a minute and fill the screen."""
    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _check_family(source: str, options: dict[str, Any]) -> None:
    """Refuse a model that no adapter serves, by its config alone."""
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise CheckpointError(f"model={source!r} cannot be loaded: it has no config.json; give a complete checkpoint.")
    with _readable(source):
        settings: Any = PreTrainedConfig.get_config_dict(source, **_fetching(options))[0]
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str):
        raise CheckpointError(
            f"model={source!r} cannot be loaded: its config.json names no model_type; give a complete checkpoint."
        )
    family = check_model_type(kind)
    if not family.whole:
        raise UnsupportedError(
            f"model={source!r} is a {family.name} (model_type={kind!r}), no vision-language model; load it with "
            "transformers and compress it with mmtoken.compress."
        )


def _processor(source: str, options: dict[str, Any]) -> ProcessorMixin:
    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        # transformers would go on with a tokenizer that knows no special tokens.
        raise CheckpointError(
            f"model={source!r} cannot be loaded: it has no tokenizer_config.json; save its processor there."
        )
    with _readable(source):
        processor = AutoProcessor.from_pretrained(source, **_fetching(options))
    if not isinstance(processor, ProcessorMixin):
        raise CheckpointError(
            f"model={source!r} cannot be loaded: of its processor there is only a {type(processor).__name__}; save its "
            "processor there."
        )
    return processor


def _fetching(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where files come from."""
    return {name: options[name] for name in (*_DOWNLOAD, "trust_remote_code") if name in options}


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise about a checkpoint into one kind of error."""
    try:
        yield
    except (MMTokenError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"model={source!r} needs a package that is missing: {reason}") from error
    except Exception as error:  # transformers, tokenizers, safetensors and the hub's client have no common base
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 240 else f"{reason[:240]} ..."
        raise CheckpointError(
            f"model={source!r} cannot be loaded ({reason}); give a complete folder or id with config.json, a processor "
            "and safetensors weights."
        ) from error


def _refuse_pickles(source: str) -> None:
    folder = Path(source)
    if not folder.is_dir() or any(path.name != PARTS_FILE for path in folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for path in folder.glob(pattern)
    )
    if pickles:
        raise CheckpointError(
            f"model={source!r} holds its weights as {pickles[0]}, a pickle that can run any code when it is loaded; "
            "convert it to safetensors."
        )
    raise CheckpointError(f"model={source!r} has no *.safetensors file; the folder holds no weights.")


def _saved_compressor(source: str, options: dict[str, Any]) -> Compressor | None:
    """What `save` wrote beside the model, None if nothing."""
    file = Path(source) / COMPRESSOR_FILE
    if not Path(source).is_dir():
        try:
            file = _fetch(source, COMPRESSOR_FILE, options)
        except CheckpointError as error:
            if not isinstance(error.__cause__, EntryNotFoundError):
                raise
            if isinstance(error.__cause__, LocalEntryNotFoundError):
                _logger.warning(
                    "offline: whether %s was saved with a compressor is not known; none is attached", source
                )
            return None
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text())
        schema = saved["schema_version"]
        spec = {"class_path": saved["class_path"], "init_args": saved["init_args"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no compressor file ({type(error).__name__}: {error}); delete it or save the model again."
        ) from error
    if schema != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has schema_version={schema!r}, this mmtoken reads {SCHEMA_VERSION}; upgrade mmtoken."
        )
    try:
        method: Compressor = resolve(spec)
    except MMTokenError as error:
        raise type(error)(f"{file}: {error}") from error
    return method


def _fetch(source: str, name: str, options: dict[str, Any]) -> Path:
    """A file of a repository on the hub."""
    fetching = {key: value for key, value in _fetching(options).items() if key in _DOWNLOAD}
    with _readable(source):
        return Path(hf_hub_download(source, name, **fetching))


def _with_parts(model: PreTrainedModel, saved: Compressor, source: str, options: dict[str, Any]) -> Trained:
    """The learned parts that `save` wrote beside the compressor file."""
    folder = Path(source)
    file = folder / PARTS_FILE if folder.is_dir() else _fetch(source, PARTS_FILE, options)
    if not file.is_file():
        raise CheckpointError(
            f"model={source!r} was saved with a {type(saved).__name__}, but {PARTS_FILE} with its learned parts is "
            f"missing; fetch or save it again, or delete {COMPRESSOR_FILE} to load the model alone."
        )
    trained = empty(model, saved)
    try:
        # Copies: a file that is mapped into memory must not change while the weights are in use.
        parts = {name: value.clone() for name, value in load_file(file).items()}
        trained.module.load_state_dict(parts, assign=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:240]
        raise CheckpointError(
            f"{file} cannot be loaded as the learned parts of a {type(saved).__name__} ({reason}); fetch or save it "
            "again."
        ) from error
    tower = adapt(model).tower()
    assert tower is not None
    return trained.to(next(tower.module.parameters()).device).eval()


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    processor: ProcessorMixin | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model, the compressor attached to it (learned parts included) and its processor to a folder that `load`
    reads.

    The folder appears whole or not at all. Returns it.

    Args:
        model: any transformers model, with or without a compressor attached.
        folder: a new or empty folder.
        processor: saved beside the model; without one, `load` needs it added.
        overwrite: replace the checkpoint in the folder, with everything beside it.

    Raises:
        CheckpointError: the folder is not empty, or a file of this name exists.
        UnsupportedError: the attached compressor cannot be found again by its name.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise CheckpointError(
            f"folder={str(target)!r} exists and is not empty; give a new folder, or overwrite=True to replace it."
        )
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise CheckpointError(
            f"folder={str(target)!r} holds no checkpoint, so overwrite=True does not replace it; give another folder."
        )
    session = attached(model)
    record = None if session is None else _record(session.compressor)
    with whole_folder(target) as whole:
        model.save_pretrained(whole)
        if processor is not None:
            processor.save_pretrained(whole)
        if record is not None:
            (whole / COMPRESSOR_FILE).write_text(json.dumps(record, indent=2) + "\n")
        if session is not None and session.trained is not None:
            parts = session.trained.module.state_dict()
            save_file({name: value.detach().cpu().contiguous() for name, value in parts.items()}, whole / PARTS_FILE)
    return target


def _record(compressor: Compressor) -> dict[str, Any]:
    """The content of the compressor file."""
    spec = compressor.to_dict()
    try:
        found = resolve(spec) == compressor
    except MMTokenError:
        found = False
    if not found:
        raise UnsupportedError(
            f"compressor={compressor!r} cannot be found again as {spec['class_path']!r}; define its class at the top "
            "of a module, or detach it before saving."
        )
    return {"schema_version": SCHEMA_VERSION, "mmtoken_version": __version__, **spec}
