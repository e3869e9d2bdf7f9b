"""The zoo: models trained by this project that ship inside the package. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmtoken.errors import UnknownNameError, near_names

_ASSETS = Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class ZooModel:
    """A zoo entry; its card lies at `models/<folder>/README.md` in the repository.

    Attributes:
        name: what `load` takes.
        description: one line for people.
        folder: in `mmtoken/assets`, in the format that transformers loads.
        card: folder of the card under `models/`.
        licence: of the weights.
        benchmarks: what the model was trained for, by their names in `mmtoken.evaluation.benchmarks`; none for models
            that answer no questions about single pictures.
        evaluation: how to evaluate those, the module with its arguments.
    """

    name: str
    description: str
    folder: str
    card: str
    licence: str = "Apache-2.0"
    benchmarks: tuple[str, ...] = ("shapes_qa", "photo_digits")
    evaluation: str = ""

    @property
    def path(self) -> Path:
        """Where the checkpoint is."""
        return _ASSETS / self.folder


DEFAULT = "tiny-llava"

ZOO: tuple[ZooModel, ...] = (
    ZooModel(
        "tiny-llava", "LLaVA, 3 M parameters: questions about shapes, digits on photographs", "tiny_llava", "tiny_llava"
    ),
    ZooModel(
        "tiny-llava-brief-dense",
        "the same, with the dense patch loss (it favours saliency methods) in the first fifth of training only",
        "tiny_llava_brief_dense",
        "tiny_llava",
    ),
    ZooModel(
        "tiny-document",
        "Idefics3, 2 M parameters: reads fields, tables and figures off generated pages in crops",
        "tiny_document",
        "tiny_document",
        benchmarks=("document_pages",),
    ),
    ZooModel(
        "tiny-llava-video",
        "LLaVA-OneVision, 3 M parameters: what came, left, moved and was to be read in a clip of shapes",
        "tiny_llava_video",
        "tiny_llava_video",
        benchmarks=(),
        evaluation="mmtoken.evaluation.video --model tiny-llava-video",
    ),
    *(
        ZooModel(
            f"tiny-openvla{suffix}",
            f"OpenVLA, 1 M parameters: picks up the named thing of the PickPlace task and puts it down{note}",
            f"tiny_openvla{suffix.replace('-', '_')}",
            "tiny_openvla",
            benchmarks=(),
            evaluation="mmtoken.evaluation.closed_loop",
        )
        for suffix, note in (("", ""), ("-seed1", "; training seed 1"), ("-seed2", "; training seed 2"))
    ),
)


def list_models() -> list[ZooModel]:
    """The zoo entries that this installation holds."""
    return [entry for entry in ZOO if (entry.path / "config.json").is_file()]


def find_model(name: str) -> ZooModel:
    """The zoo entry of that name.

    Raises:
        UnknownNameError: there is none; the message lists near names.
    """
    entries = {entry.name: entry for entry in list_models()}
    if name not in entries:
        raise UnknownNameError(
            f"model={name!r} is no zoo entry, no folder and no Hugging Face id of the form 'org/name'"
            f"{near_names(name, entries)}"
        )
    return entries[name]
