"""Load a model with its processor, and save it together with the compressor that is attached to it.

Weights are read from safetensors only, and no code from a repository runs unless the caller says so.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from mmtoken.backbones.registry import adapt, check_model_type
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.pretrained import (
    COMPRESSOR_FILE,
    Record,
    check_folder,
    find,
    read_parts,
    read_record,
    record_of,
    write,
)
from mmtoken.compressors.trained import Trained
from mmtoken.engine.learned import dims_of
from mmtoken.engine.session import attach, attached
from mmtoken.errors import CheckpointError, MMTokenError, UnsupportedError, near_names
from mmtoken.models import llava_video as llava_video  # makes transformers' Auto classes know it
from mmtoken.models import openvla as openvla  # the same
from mmtoken.models.registry import DEFAULT, ZooModel, find_model, list_models
from mmtoken.repository import DOWNLOAD, PICKLES, fetch, file_names, is_repository, pinned, reason, upload
from mmtoken.wholefile import whole_folder

__all__ = ["ZooModel", "list_models", "load", "push", "save", "skeleton"]

ADAPTER_FILE = "adapter_config.json"
"""Where it lies, transformers takes weights from the files that it names, pickles among them."""

_logger = logging.getLogger(__name__)


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    compressor: Compressor | Trained | str | os.PathLike[str] | dict[str, Any] | None = None,
    **hf_kwargs: Any,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A vision-language model, ready to generate, and its processor.

    A compressor given here, or saved with the model, comes attached; `mmtoken.attached(model)` is its session.

    Args:
        name_or_path: a zoo entry ("tiny-llava", the default), a folder, or a Hugging Face id ("org/name").
        compressor: an instance, a name, {"class_path": ..., "init_args": ...}, or the folder or Hugging Face id of a
            saved one ("org/name", at its main revision); goes before one that was saved with the model.
        **hf_kwargs: go to `from_pretrained` (dtype, device_map, attn_implementation, revision, token, ...).

    Raises:
        UnknownNameError: no zoo entry, folder or id of this name.
        UnsupportedError: the model's family has no adapter, or cannot host the compressor.
        CheckpointError: files are missing, corrupt, do not fit together, or hold pickles instead of safetensors.
    """
    source, options = _locate(DEFAULT if name_or_path is None else os.fspath(name_or_path), dict(hf_kwargs))
    settings = _check_family(source, options)
    with _readable(source):
        AutoConfig.from_pretrained(source, **_fetching(options))  # refuses code and settings out of range early
    # The revision is that of the model.
    fetching = {name: hf_kwargs[name] for name in DOWNLOAD if name in hf_kwargs and name != "revision"}
    chosen = None if compressor is None else find(compressor, fetching)
    saved = _saved(source, options) if compressor is None else None
    if saved is not None:
        trainable = saved.compressor.trainable
        chosen = read_parts(saved, source, options, "model") if trainable else saved.compressor
    _check_weights(source, options, settings)
    settled = {
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        # Else it would look for an adapter on the main branch, whatever was asked, and on the hub even when offline.
        "adapter_kwargs": {name: options[name] for name in DOWNLOAD if name in options},
    }
    with _readable(source):
        # With output_loading_info a pair comes back, which its annotation does not say.
        loaded: Any = AutoModelForImageTextToText.from_pretrained(source, **{**options, **settled})
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
    if isinstance(chosen, Trained) and chosen is not compressor:
        tower = adapt(model).tower()
        if tower is not None:
            chosen.to(next(tower.module.parameters()).device)
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
    saved = _saved(source, options)
    return model.eval(), None if saved is None else saved.compressor


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
    if is_repository(name):
        return name, pinned(name, "config.json", options, "model")
    return str(find_model(name).path), {**options, "local_files_only": True}


def _check_family(source: str, options: dict[str, Any]) -> dict[str, Any]:
    """Refuse a model that no adapter serves, by its config alone, which is returned."""
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
    return dict(settings)


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
    return {name: options[name] for name in (*DOWNLOAD, "trust_remote_code") if name in options}


@contextmanager
def _readable(source: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise about a checkpoint into one kind of error."""
    try:
        yield
    except (MMTokenError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise UnsupportedError(f"model={source!r} needs a package that is missing: {reason(error)}") from error
    except Exception as error:  # transformers, tokenizers, safetensors and the hub's client have no common base
        raise CheckpointError(
            f"model={source!r} cannot be loaded ({reason(error)}); give a complete folder or id with config.json, a "
            "processor and safetensors weights."
        ) from error


def _check_weights(source: str, options: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse what transformers would read besides safetensors files that lie where the model is.

    `use_safetensors=True` is not enough: an index may list pickles and files elsewhere, a config may name one, and an
    adapter brings its own.
    """
    if _found(source, ADAPTER_FILE, options) is not None:
        raise CheckpointError(
            f"model={source!r} holds {ADAPTER_FILE}, an adapter apart from the weights; merge it into them with peft "
            "(merge_and_unload) and save the model again."
        )
    variant = f".{options['variant']}" if options.get("variant") else ""
    place = f"{options['subfolder']}/" if options.get("subfolder") else ""
    named = settings.get("transformers_weights")
    single, index = f"model{variant}.safetensors", f"model.safetensors.index{variant}.json"
    if named is not None:
        _check_name(source, "config.json", named, (".safetensors", ".safetensors.index.json"))
        single, index = named, named if named.endswith(".json") else index
    listed = _found(source, place + index, options)
    if listed is not None:
        try:
            shards = sorted(set(json.loads(listed.read_text())["weight_map"].values()), key=str)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"model={source!r}: {index} is no index of weights ({reason(error)}); fetch or export it again."
            ) from error
        for shard in shards:
            _check_name(source, index, shard, (".safetensors",))
    elif fetch(source, place + single, options, "model") is None:
        _refuse_pickles(source, file_names(source, options))


def _found(source: str, name: str, options: dict[str, Any]) -> Path | None:
    """A file that transformers would read, None if it finds none."""
    try:
        return fetch(source, name, options, "model")
    except CheckpointError as error:
        # Nobody is asked: what is not in the cache is not there for transformers either.
        if options.get("local_files_only") and isinstance(error.__cause__, LocalEntryNotFoundError):
            return None
        raise


def _check_name(source: str, where: str, name: object, endings: tuple[str, ...]) -> None:
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:\0") or not name.endswith(endings):
        raise CheckpointError(
            f"model={source!r}: {where} names {name!r} as a file of weights; only *.safetensors files beside it are "
            "read, pickles and other folders are not."
        )


def _refuse_pickles(source: str, names: list[str]) -> None:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise CheckpointError(
            f"model={source!r} holds its weights as {pickles[0]}, a pickle that can run any code when it is loaded; "
            "convert it to safetensors."
        )
    raise CheckpointError(f"model={source!r} has no *.safetensors file; it holds no weights.")


def _saved(source: str, options: dict[str, Any]) -> Record | None:
    """What `save` wrote beside the model, None if nothing."""
    try:
        return read_record(source, options, "model")
    except CheckpointError as error:
        if not isinstance(error.__cause__, LocalEntryNotFoundError):
            raise
        _logger.warning("offline: whether %s was saved with a compressor is not known; none is attached", source)
        return None


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
    target = check_folder(folder, "config.json", "checkpoint", overwrite)
    session = attached(model)
    given = None if session is None else session.trained or session.compressor
    if given is not None:
        record_of(given)  # refuses before there is a file
    with whole_folder(target) as whole:
        model.save_pretrained(whole)
        if processor is not None:
            processor.save_pretrained(whole)
        if given is not None:
            write(given, whole, dims_of(adapt(model)) if isinstance(given, Trained) else None)
    return target


def push(
    folder: str | os.PathLike[str],
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    message: str = "Upload a model",
) -> str:
    """Send a folder that `save` or `save_pretrained` wrote to a repository of the hub, in one commit.

    Weights and compressor files that the repository had and the folder lacks leave it in the same commit; other files
    stay. Returns the commit, which `load(name, revision=...)` takes.

    Args:
        folder: what to send.
        name: "org/name"; made if there is none.
        revision: an existing branch; None: the main one.
        token: of the account; None: the one that is logged in.
        private: for a new repository; None: as its owner has set.
        message: of the commit.

    Raises:
        CheckpointError: the folder is incomplete or holds pickles; or the hub cannot be reached or refuses, and the
            repository's files are as they were.
        UnknownNameError, MMTokenError: its compressor cannot be read.
    """
    source = Path(folder)
    if not source.is_dir():
        raise CheckpointError(
            f"folder={str(source)!r} does not exist; give one that save() or save_pretrained() wrote."
        )
    pickles = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.name.endswith(PICKLES))
    if pickles:
        raise CheckpointError(f"folder={str(source)!r} holds {pickles[0]}, a pickle; take it out before it is shared.")
    record = read_record(str(source), {}, "folder")
    if record is not None and record.compressor.trainable:
        read_parts(record, str(source), {}, "folder")
    if (source / "config.json").is_file():
        _check_weights(str(source), {}, _check_family(str(source), {}))
        for file in sorted(source.glob("*.safetensors")):
            with _readable(str(source)), safe_open(file, "pt"):  # sees whether the file is whole, reads no weights
                pass
    elif record is None:
        raise CheckpointError(f"folder={str(source)!r} holds no config.json and no {COMPRESSOR_FILE}; nothing to push.")
    replace = [COMPRESSOR_FILE, "*.safetensors", "*.safetensors.index.json"]
    return upload(source, name, revision=revision, token=token, private=private, message=message, replace=replace)
