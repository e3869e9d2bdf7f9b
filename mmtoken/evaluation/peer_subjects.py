"""What is compared with which peer: the tiny models, prompts and methods, and how the peer is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from mmtoken.evaluation.peer_formulas import Reference, reference
from mmtoken.evaluation.peer_visual_formulas import ANGELSLIM, PUBLISHED, visual_reference

Methods = Mapping[str, dict[str, Any]]

CACHE_METHODS: Methods = {
    "SnapKV": {"window": 64, "kernel": 5},
    "ExpectedAttention": {"future": 512, "sinks": 4},
    "TOVA": {},
    "KeyDiff": {},
    "Knorm": {},
}
"""What both kvpress and mmtoken have: name -> settings, the official defaults."""

VISUAL_METHODS: Methods = {
    "DivPrune": {},
    "VisPruner": {},
    "FastV": {"layer": 2},
    "DART": {"layer": 2, "visual_pivots": 4, "text_pivots": 4},
}
"""What both AngelSlim and mmtoken have for LLaVA, with the published defaults."""


class Subject(Protocol):
    """A tiny model with random weights, and prompts for it."""

    first_read: int
    """The first generated token whose logits depend on what was kept."""

    def model(self) -> Any:
        """The model; draws from the global generator."""

    def save(self, model: Any, folder: Path) -> None:
        """As a checkpoint that all versions of transformers read."""

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """row0, row1, ... int[n], prompts of these lengths, and what else each needs; draws likewise."""

    def reference(
        self, model: Any, inputs: Mapping[str, Tensor], row: int, length: int, method: tuple[str, dict[str, Any]],
        keep: float, tokens: int, own: bool = False,
    ) -> Reference:  # fmt: skip
        """What the formula of a method gives for the first `length` tokens of a row; `own`: as the peer has it."""

    def describe(self) -> str:
        """For the page."""


@dataclass(frozen=True)
class Size:
    """A Llama."""

    hidden_size: int = 256
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    vocab_size: int = 512
    initializer_range: float = 0.15

    first_read = 1

    def config(self) -> LlamaConfig:
        """Without special tokens but that of padding."""
        return LlamaConfig(**asdict(self), bos_token_id=None, eos_token_id=None, pad_token_id=0)

    def model(self) -> Any:
        return LlamaForCausalLM(self.config())

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """No token comes twice in a prompt, nor does the padding id: keys of equal tokens are equally long."""
        return {f"row{number}": torch.randperm(self.vocab_size - 1)[:length] + 1 for number, length in enumerate(rows)}

    def reference(
        self, model: Any, inputs: Mapping[str, Tensor], row: int, length: int, method: tuple[str, dict[str, Any]],
        keep: float, tokens: int, own: bool = False,
    ) -> Reference:  # fmt: skip
        return reference(model, inputs[f"row{row}"][:length], *method, keep, tokens)

    def describe(self) -> str:
        return (
            f"Random Llama: {self.num_hidden_layers} layers of width {self.hidden_size}, {self.num_attention_heads} "
            f"heads on {self.num_key_value_heads} of keys, float32."
        )


@dataclass(frozen=True)
class PictureSize:
    """A LLaVA; every prompt has one picture behind `before` tokens of text."""

    text: Size = field(default_factory=Size)
    width: int = 64
    blocks: int = 4
    image: int = 96
    patch: int = 6
    before: int = 5

    first_read = 0

    @property
    def patches(self) -> int:
        """Visual tokens of a picture."""
        return (self.image // self.patch) ** 2

    def model(self) -> Any:
        tower = CLIPVisionConfig(
            hidden_size=self.width, intermediate_size=2 * self.width, num_hidden_layers=self.blocks,
            num_attention_heads=4, image_size=self.image, patch_size=self.patch, projection_dim=self.width,
            initializer_range=self.text.initializer_range,
        )  # fmt: skip
        picture = self.text.vocab_size - 1
        config = LlavaConfig(
            vision_config=tower,
            text_config=self.text.config(),
            image_token_index=picture,
            image_seq_length=self.patches,
        )
        return LlavaForConditionalGeneration(config)

    def save(self, model: Any, folder: Path) -> None:
        """With the names that published checkpoints have: those that new versions write are unknown to old ones."""
        model.save_pretrained(folder)
        weights, tower = load_file(folder / "model.safetensors"), "vision_tower."
        longer = {
            f"{tower}vision_model.{name.removeprefix(tower).removeprefix('vision_model.')}"
            if name.startswith(tower)
            else name: weight
            for name, weight in weights.items()
        }
        save_file(longer, folder / "model.safetensors", metadata={"format": "pt"})

    def inputs(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """row0, ... int[n]; pixels0, ... float[3, S, S]."""
        found = {}
        for number, length in enumerate(rows):
            text = torch.randperm(self.text.vocab_size - 2)[: length - self.patches] + 1
            picture = torch.full((self.patches,), self.text.vocab_size - 1)
            found[f"row{number}"] = torch.cat([text[: self.before], picture, text[self.before :]])
            found[f"pixels{number}"] = torch.randn(3, self.image, self.image)
        return found

    def reference(
        self, model: Any, inputs: Mapping[str, Tensor], row: int, length: int, method: tuple[str, dict[str, Any]],
        keep: float, tokens: int, own: bool = False,
    ) -> Reference:  # fmt: skip
        ids, pixels = inputs[f"row{row}"][:length], inputs[f"pixels{row}"]
        return visual_reference(model, ids, pixels, *method, keep, tokens, ANGELSLIM if own else PUBLISHED)

    def describe(self) -> str:
        return (
            f"Random LLaVA: a CLIP tower of {self.blocks} blocks of width {self.width}, {self.patches} visual tokens a "
            f"picture, and a {self.text.describe().removeprefix('Random ')}"
        )


@dataclass(frozen=True)
class Peer:
    """A library that is compared.

    Attributes:
        title: its name.
        requirements: what pip installs.
        distributions: whose versions are told.
        accepts: its range of transformers, as its metadata has it.
        more: what it does that mmtoken does not.
        less: what mmtoken does that it does not, of what was compared here.
        subject: the model.
        methods: what is compared.
        rows: lengths of the prompts; together they are the padded batch.
        keep: share that stays.
        kept, counted, formulas: for the page: of what that share is, what counts as kept, the formulas' file.
        probes: further cases, of the first method: how a side answers them.
        source: where a checkout of it comes from, if no release has what is compared.
        departs: how its formulas differ from the published ones.
        page: where results and page go.
    """

    title: str
    requirements: tuple[str, ...]
    distributions: tuple[str, ...]
    accepts: str
    more: str
    less: str
    subject: Subject
    methods: Methods
    rows: tuple[int, ...]
    keep: float
    kept: str
    counted: str
    formulas: str
    probes: tuple[str, ...]
    page: str
    source: str = ""
    departs: str = ""


TORCH = f"torch=={torch.__version__.partition('+')[0]}"

PEERS: dict[str, Peer] = {
    "kvpress": Peer(
        title="kvpress",
        requirements=("kvpress==0.5.5", "transformers==5.2.0", TORCH),
        distributions=("kvpress",),
        accepts="at least 4.56, below 5.3",
        more="about forty presses for caches of text models, mmtoken has these five; wrappers that combine presses, "
        "budgets per head and per layer; compression while decoding; quantized caches; a pipeline that leaves the "
        "question out of the compression and answers several; a benchmark suite for long texts.",
        less="a budget for the visual tokens only, per image (its default; here it counts whole prompts, as the peer "
        "does); methods that drop visual tokens before and between the layers of vision-language models.",
        subject=Size(),
        methods=CACHE_METHODS,
        rows=(384, 320, 240, 160),  # half of the shortest holds SnapKV's window
        keep=0.5,
        kept="of n entries of every head stay, counted over the whole prompt",
        counted="cached entries that the formula keeps too, over all prompts, layers and heads",
        formulas="peer_formulas.py",
        probes=(
            "keep nothing",
            "a prompt shorter than the window",
            "static cache",
            "prompt lookup decoding",
            "prefill in chunks",
        ),
        page="peers",
    ),
    "angelslim": Peer(
        title="AngelSlim",
        requirements=("transformers==5.0.0", TORCH, "PyYAML"),
        distributions=(),
        accepts="5.0.0 for its token compressor (`requirements/requirememts_token_compressor.txt`)",
        more="HiPrune, SCOPE and IDPruner; VisionSelector with trained weights for Qwen2.5-VL; configuration files for "
        "both of its families of models; and, outside of what is compared, quantization, speculative decoding and "
        "sparse attention. Its VisionZip merges behind the projector, mmtoken's before it, as the official code does; "
        "these two were not compared.",
        less="batches; other families than LLaVA-1.5 and Qwen2.5-VL; current versions of transformers; a budget for "
        "each image in every method; the other methods and the places where they act.",
        subject=PictureSize(),
        methods=VISUAL_METHODS,
        rows=(384, 340, 310, 280),
        keep=0.25,
        kept="of n visual tokens stay; those kept keep their positions",
        counted="visual tokens that the formula keeps too, over all prompts and heads, in the first layer "
        "that has less than all of them",
        formulas="peer_visual_formulas.py",
        probes=(
            "keep nothing",
            "a prompt without a picture",
            "two pictures in a prompt",
            "beam search",
            "static cache",
            "prompt lookup decoding",
        ),
        page="peers-angelslim",
        source="https://github.com/Tencent/AngelSlim",
        departs="VisPruner shares a head's attention among the patches only, compares tokens behind the projector "
        "and deals the survivors of a round in raster order; FastV shares a head's attention among the visual tokens "
        "only; DART compares what the attention of layer 1 reads, where the official code takes the states under the "
        "decoder's last norm, and takes text in front of the picture as a pivot too. Where tokens go before the "
        "decoder (DivPrune, VisPruner), the prompt keeps its positions, but those of the answer count the tokens that "
        "are left, so that they lie inside the prompt.",
    ),
}
