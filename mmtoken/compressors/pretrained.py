"""Compressors in folders and on the hub: one JSON file, the learned parts as safetensors, and a card."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from mmtoken import __version__
from mmtoken.errors import CheckpointError, MMTokenError, UnsupportedError
from mmtoken.repository import fetch, is_repository, pinned, reason, upload
from mmtoken.wholefile import whole_folder

if TYPE_CHECKING:
    from mmtoken.compressors.base import Compressor, Dims
    from mmtoken.compressors.trained import Trained

COMPRESSOR_FILE = "mmtoken_compressor.json"
"""{"schema_version", "mmtoken_version", "class_path", "init_args"}; with learned parts also "dims", the sizes of the
model that they were built for, and "parts_sha256" of their file."""

PARTS_FILE = "mmtoken_compressor.safetensors"
"""Beside that file, if the compressor has learned parts: their weights."""

CARD_FILE = "README.md"

SCHEMA_VERSION = 1

_LARGEST = 2**20
"""Bytes of a compressor file; the largest real ones have a few thousand."""


class Pretrained:
    """What `Compressor` and `Trained` share: to folders and to the hub, and back."""

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        results: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Write settings, learned parts (of `Trained`) and a card to a folder that `from_pretrained` reads.

        The folder appears whole or not at all. Returns it.

        Args:
            folder: a new or empty folder.
            results: an accuracy result of `mmtoken bench`, as a file or its content; the card shows what this method
                reached in it.
            overwrite: replace the compressor in the folder, with everything beside it.

        Raises:
            CheckpointError: the folder is not empty, or a file of this name exists.
            UnsupportedError: the compressor cannot be found again by its name, or settings of it are live objects.
            MMTokenError: the learned parts are missing, or it is not known for which sizes they were built.
            InputError: the results are no accuracy result, or hold none of this method.
        """
        return _save(self, folder, results, overwrite, name="path/to/this/folder")

    def push_to_hub(
        self,
        name: str,
        *,
        results: Mapping[str, Any] | str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        message: str = "Upload a compressor",
    ) -> str:
        """Send what `save_pretrained` writes to a repository of the hub, in one commit. Returns that commit.

        Args:
            name: "org/name"; made if there is none.
            results: as for `save_pretrained`.
            revision: an existing branch; None: the main one.
            token: of the account; None: the one that is logged in.
            private: for a new repository; None: as its owner has set.
            message: of the commit.

        Raises:
            CheckpointError: the hub cannot be reached or refuses; the repository's files are as they were.
            MMTokenError: as `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as work:
            folder = _save(self, Path(work) / "compressor", results, False, name=name)
            return upload(
                folder,
                name,
                revision=revision,
                token=token,
                private=private,
                message=message,
                replace=[COMPRESSOR_FILE, PARTS_FILE],
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Any:
        """What `save_pretrained` or `push_to_hub` wrote, or `mmtoken.save` beside a model.

        A `Trained` comes back with its weights, on the CPU and in evaluation mode; other compressors as they are. No
        code of the repository runs and no pickle is read; all files are of one commit.

        Args:
            name_or_folder: a folder, or "org/name" on the hub.
            revision: a branch, tag or commit.
            token: of an account that may read; None: the one that is logged in.
            cache_dir: of the hub's client.
            local_files_only: take what is in the cache, ask nobody.
            force_download: fetch anew what is in the cache.

        Raises:
            CheckpointError: files cannot be fetched, are missing, corrupt or do not fit together; or they hold another
                class than the one that is asked.
            UnknownNameError: they name a class that is no compressor, or one of a module that is not imported.
            MMTokenError: they hold settings that the class refuses.
        """
        options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        found = read(os.fspath(name_or_folder), options)
        if not isinstance(found, cls):
            settings = getattr(found, "compressor", found)  # QueCC.from_pretrained is asked for what a Trained holds
            if not isinstance(settings, cls):
                raise CheckpointError(
                    f"compressor={os.fspath(name_or_folder)!r} holds a {type(settings).__name__}, no {cls.__name__}; "
                    "use Compressor.from_pretrained, which takes all."
                )
        return found


@dataclasses.dataclass(frozen=True)
class Record:
    """The content of a compressor file.

    Attributes:
        file: where it was read.
        compressor: the settings.
        dims: of the model that the learned parts were built for; None without such parts.
        digest: SHA-256 of their file.
    """

    file: Path
    compressor: Compressor
    dims: Dims | None
    digest: str | None


def find(
    given: Compressor | Trained | str | os.PathLike[str] | dict[str, Any], options: dict[str, Any], **settings: Any
) -> Compressor | Trained:
    """A compressor from whatever `registry.resolve` takes, or from the folder or repository of a saved one.

    Args:
        given: a string with a slash, or the name of a folder that holds a compressor, is read there.
        options: those of `DOWNLOAD` count.
        **settings: settings that go on top.

    Raises:
        CheckpointError, UnknownNameError, MMTokenError: as `Pretrained.from_pretrained` and `registry.resolve`.
    """
    from mmtoken.compressors.registry import resolve

    saved = isinstance(given, os.PathLike) or (
        isinstance(given, str) and ("/" in given or (Path(given) / COMPRESSOR_FILE).is_file())
    )
    return resolve(read(os.fspath(given), options) if saved else given, **settings)  # type: ignore[arg-type]


def read(name: str, options: dict[str, Any]) -> Compressor | Trained:
    """The compressor in a folder or a repository.

    Raises:
        CheckpointError, UnknownNameError, MMTokenError: as `Pretrained.from_pretrained`.
    """
    source = str(Path(name).expanduser())
    if not Path(source).is_dir():
        if not is_repository(name):
            raise CheckpointError(f"compressor={name!r} is no folder and no repository of the form 'org/name'.")
        source = name
        options = pinned(source, COMPRESSOR_FILE, options, "compressor")
    record = read_record(source, options, "compressor")
    if record is None:
        raise CheckpointError(f"compressor={name!r} cannot be loaded: it has no {COMPRESSOR_FILE}.")
    return read_parts(record, source, options, "compressor") if record.compressor.trainable else record.compressor


def read_record(source: str, options: dict[str, Any], field: str) -> Record | None:
    """The compressor file of a folder or a repository; None if there is none.

    Raises:
        CheckpointError: it cannot be fetched, is malformed, or of a newer format or version.
        UnknownNameError, MMTokenError: the class or its settings are refused.
    """
    from mmtoken.compressors.base import Dims, check_whole
    from mmtoken.compressors.registry import resolve

    file = fetch(source, COMPRESSOR_FILE, options, field)
    if file is None:
        return None
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        saved = json.loads(file.read_text())
        schema = saved["schema_version"]
        major = int(saved["mmtoken_version"].split(".")[0])
        spec = {"class_path": saved["class_path"], "init_args": saved["init_args"]}
        dims = None if saved.get("dims") is None else Dims(**saved["dims"])
        for size in () if dims is None else dataclasses.fields(dims):
            check_whole(size.name, getattr(dims, size.name), lowest=1)
        digest = saved.get("parts_sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is no compressor file ({type(error).__name__}: {error}); delete it or save the model again."
        ) from error
    if schema != SCHEMA_VERSION:
        raise CheckpointError(
            f"{file} has schema_version={schema!r}, this mmtoken reads {SCHEMA_VERSION}; upgrade mmtoken."
        )
    if major > int(__version__.split(".")[0]):
        raise CheckpointError(
            f"{file} was written by mmtoken_version={saved['mmtoken_version']!r} and this is {__version__}; upgrade "
            "mmtoken."
        )
    try:
        method: Compressor = resolve(spec)
    except MMTokenError as error:
        raise type(error)(f"{file}: {error}") from error
    except Exception as error:  # what checks of settings let through
        raise CheckpointError(f"{file}: {spec['class_path']} refuses its settings ({reason(error)}).") from error
    if method.trainable and (dims is None or not isinstance(digest, str)):
        raise CheckpointError(
            f"{file} names a {type(method).__name__}, which has learned parts, without dims and parts_sha256; delete "
            "it or save the compressor again."
        )
    return Record(file, method, dims, digest)


def read_parts(record: Record, source: str, options: dict[str, Any], field: str) -> Trained:
    """The compressor with its learned parts, which lie beside its file.

    Raises:
        CheckpointError: they are missing, corrupt, of other shapes, or not those that were saved with the file.
    """
    from mmtoken.compressors.trained import Trained

    method = record.compressor
    name = type(method).__name__
    file = fetch(source, PARTS_FILE, options, field)
    if file is None:
        raise CheckpointError(
            f"{field}={source!r} was saved with a {name}, but {PARTS_FILE} with its learned parts is missing; fetch or "
            f"save it again, or delete {COMPRESSOR_FILE} to load the model alone."
        )
    assert record.dims is not None
    try:
        with torch.device("meta"):
            module = method.build(record.dims)
    except Exception as error:  # sizes and settings that each are in range need not go together
        raise CheckpointError(f"{record.file}: no {name} can be built from it ({reason(error)}).") from error
    try:
        content = file.read_bytes()  # no mapped file, which could change while the weights are in use
        parts = load(content)
    except (OSError, SafetensorError) as error:
        raise _misfit(file, name, reason(error)) from error
    wanted = module.state_dict()
    for key in sorted(wanted.keys() | parts.keys()):
        if key not in parts:
            raise _misfit(file, name, f"{key} is missing")
        if key not in wanted:
            raise _misfit(file, name, f"{key} is none of them")
        if parts[key].shape != wanted[key].shape:
            raise _misfit(file, name, f"{key} is {list(parts[key].shape)} instead of {list(wanted[key].shape)}")
        if parts[key].is_floating_point() != wanted[key].is_floating_point():
            raise _misfit(file, name, f"{key} is {parts[key].dtype} instead of {wanted[key].dtype}")
    if hashlib.sha256(content).hexdigest() != record.digest:
        raise _misfit(file, name, f"{COMPRESSOR_FILE} was saved with other weights, perhaps of another revision")
    module.load_state_dict(parts, assign=True)
    return Trained(method, module, record.dims).eval()


def write(given: Compressor | Trained, folder: Path, dims: Dims | None) -> None:
    """Write the compressor file, and the learned parts of `Trained`, into a folder that exists.

    Args:
        given: what to write.
        folder: where.
        dims: of the model; None without learned parts.
    """
    record = record_of(given)
    module = getattr(given, "module", None)
    if module is not None:
        parts = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
        save_file(parts, folder / PARTS_FILE)
        assert dims is not None
        record["dims"] = dataclasses.asdict(dims)
        record["parts_sha256"] = hashlib.sha256((folder / PARTS_FILE).read_bytes()).hexdigest()
    (folder / COMPRESSOR_FILE).write_text(json.dumps(record, indent=2) + "\n")


def record_of(given: Compressor | Trained) -> dict[str, Any]:
    """The content of the compressor file, without what belongs to learned parts.

    Raises:
        UnsupportedError: the class cannot be found again by its name.
        MMTokenError: a setting is a live object.
    """
    from mmtoken.compressors.registry import resolve
    from mmtoken.compressors.trained import settings_of

    spec = given.to_dict()
    try:
        found = resolve(spec) == settings_of(given)
    except MMTokenError:
        found = False
    if not found:
        raise UnsupportedError(
            f"compressor={settings_of(given)!r} cannot be found again as {spec['class_path']!r}; define its class at "
            "the top of a module, or detach it before saving."
        )
    return {"schema_version": SCHEMA_VERSION, "mmtoken_version": __version__, **spec}


def check_folder(folder: str | os.PathLike[str], marker: str, what: str, overwrite: bool) -> Path:
    """The folder, if something may be saved there.

    Args:
        folder: where.
        marker: a file that only folders with such things have.
        what: their name.
        overwrite: whether one may be replaced.

    Raises:
        CheckpointError: it is a file, or not empty and not to be replaced, or holds something else.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not overwrite)):
        raise CheckpointError(
            f"folder={str(target)!r} exists and is not empty; give a new folder, or overwrite=True to replace it."
        )
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise CheckpointError(
            f"folder={str(target)!r} holds no {what}, so overwrite=True does not replace it; give another folder."
        )
    return target


def _save(
    given: Any,
    folder: str | os.PathLike[str],
    results: Mapping[str, Any] | str | os.PathLike[str] | None,
    overwrite: bool,
    name: str,
) -> Path:
    from mmtoken.compressors.card import hub_card
    from mmtoken.compressors.trained import settings_of

    method = settings_of(given)
    dims = getattr(given, "dims", None)
    if method.trainable and given is method:
        raise MMTokenError(
            f"compressor={method!r} has learned parts: save the Trained that mmtoken.learnable(model, compressor) or a "
            "training returned."
        )
    if method.trainable and dims is None:
        raise MMTokenError(
            f"compressor={method!r}: it is not known for which sizes its parts were built; give Trained(compressor, "
            "module, dims)."
        )
    target = check_folder(folder, COMPRESSOR_FILE, "compressor", overwrite)
    card = hub_card(method, dims, results, name)
    with whole_folder(target) as whole:
        write(given, whole, dims)
        (whole / CARD_FILE).write_text(card)
    return target


def _misfit(file: Path, name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{file} cannot be loaded as the learned parts of a {name} ({why}); fetch or save it again.")
