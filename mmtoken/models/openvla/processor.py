"""The processor: pixels for each tower side by side on the channels, and the prompt with places for visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, BatchFeature, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor

from mmtoken.errors import CheckpointError, InputError
from mmtoken.models.openvla.config import OpenVLAChunksConfig, OpenVLAConfig
from mmtoken.models.openvla.splice import insert

STRATEGIES = ("resize-naive", "resize-crop", "letterbox")

Picture = Image.Image | np.ndarray[Any, Any]


class PrismaticImageProcessor(BaseImageProcessor):
    """Pictures to float[n, 3 * towers, H, W]; settings are those of an official `preprocessor_config.json`.

    Attributes:
        use_fused_vision_backbone: whether there are two towers.
        image_resize_strategy: "resize-naive" (to the square), "resize-crop" (shorter side to size, then a centre crop)
            or "letterbox" (padded to a square, then resized); the `tvf_*` settings say the rest.
        input_sizes: (3, H, W) per tower.
        interpolations: names per tower, for people.
        means, stds: per tower, of the three colours in [0, 1].
        tvf_resize_params, tvf_crop_params, tvf_normalize_params: per tower, arguments of torchvision's `resize`,
            `center_crop` and `normalize`; made from the settings above where they are missing.
        tvf_do_letterbox, tvf_letterbox_fill: whether to pad to a square, and with which colour (0 to 255).
        crop_share: of ours, share of the picture's area that is left before anything else, cut from the middle and
            scaled back; .9 as in the LIBERO evaluation. None: the whole picture.

    Raises:
        InputError: a setting is unknown or out of range.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012  # transformers declares it so

    def __init__(
        self,
        use_fused_vision_backbone: bool = False,
        image_resize_strategy: str = "letterbox",
        input_sizes: Sequence[Sequence[int]] | None = None,
        interpolations: Sequence[str] | None = None,
        means: Sequence[Sequence[float]] | None = None,
        stds: Sequence[Sequence[float]] | None = None,
        tvf_resize_params: Sequence[dict[str, Any]] | None = None,
        tvf_crop_params: Sequence[dict[str, Any]] | None = None,
        tvf_normalize_params: Sequence[dict[str, Any]] | None = None,
        tvf_do_letterbox: bool | None = None,
        tvf_letterbox_fill: Sequence[int] | None = None,
        crop_share: float | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("auto_map", None)  # names upstream's code, which is not needed
        super().__init__(**kwargs)
        if image_resize_strategy not in STRATEGIES:
            raise InputError(
                f"image_resize_strategy={image_resize_strategy!r} is unknown; use one of {', '.join(STRATEGIES)}."
            )
        if crop_share is not None and not 0 < crop_share <= 1:
            raise InputError(f"crop_share={crop_share!r} is no share of the area; give a number in (0, 1] or None.")
        self.use_fused_vision_backbone = use_fused_vision_backbone
        self.image_resize_strategy = image_resize_strategy
        self.input_sizes = [list(size) for size in input_sizes or [(3, 224, 224)]]
        towers = len(self.input_sizes)
        self.interpolations = list(interpolations or ["bicubic"] * towers)
        self.means = [list(mean) for mean in means or [(0.5, 0.5, 0.5)] * towers]
        self.stds = [list(std) for std in stds or [(0.5, 0.5, 0.5)] * towers]
        square = image_resize_strategy == "resize-naive"
        self.tvf_resize_params = list(
            tvf_resize_params
            or [
                {
                    "size": list(size[1:]) if square else size[-1],
                    "interpolation": 3,
                    "max_size": None,
                    "antialias": True,
                }
                for size in self.input_sizes
            ]
        )
        self.tvf_crop_params = list(tvf_crop_params or [{"output_size": list(size[1:])} for size in self.input_sizes])
        self.tvf_normalize_params = list(
            tvf_normalize_params
            or [{"mean": mean, "std": std} for mean, std in zip(self.means, self.stds, strict=True)]
        )
        letterbox = image_resize_strategy == "letterbox"
        self.tvf_do_letterbox = letterbox if tvf_do_letterbox is None else tvf_do_letterbox
        if letterbox and tvf_letterbox_fill is None:
            tvf_letterbox_fill = [int(value * 255) for value in self.means[0]]
        self.tvf_letterbox_fill = None if tvf_letterbox_fill is None else list(tvf_letterbox_fill)
        self.crop_share = crop_share
        per_tower = {
            name: len(getattr(self, name))
            for name in ("input_sizes", "tvf_resize_params", "tvf_crop_params", "tvf_normalize_params")
        }
        if set(per_tower.values()) != {1 + bool(use_fused_vision_backbone)}:
            raise InputError(
                f"use_fused_vision_backbone={use_fused_vision_backbone} but the settings are for other numbers of "
                f"towers: {per_tower}."
            )

    def preprocess(self, images: Picture | Sequence[Picture], return_tensors: str | None = "pt", **kwargs: Any) -> Any:
        """{"pixel_values": float[n, 3 * towers, H, W]}; the channels of the first tower come first.

        Args:
            images: pictures, or uint8[H, W, 3] arrays.
            return_tensors: "pt".
            **kwargs: not used.

        Raises:
            InputError: an image is not of that form.
        """
        if return_tensors not in ("pt", None):
            raise InputError(f"return_tensors={return_tensors!r} is not supported; use 'pt'.")
        single = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and images.ndim != 4)
        given: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        if not given:
            raise InputError("images is empty; give one picture per prompt.")
        pixels = torch.stack([self._one(as_picture(image, number)) for number, image in enumerate(given)])
        return BatchFeature({"pixel_values": pixels})

    def _one(self, image: Image.Image) -> Tensor:
        from torchvision.transforms import functional as tvf  # type: ignore[import-untyped]  # takes a second

        if self.crop_share is not None:
            image = crop_area(image, self.crop_share)
        if self.tvf_do_letterbox:
            wide, high = image.size
            side = max(wide, high)
            across, down = (side - wide) // 2, (side - high) // 2
            fill = None if self.tvf_letterbox_fill is None else tuple(self.tvf_letterbox_fill)
            image = tvf.pad(image, [across, down, across, down], fill=fill or 0)
        parts = []
        for resize, crop, normalise in zip(
            self.tvf_resize_params, self.tvf_crop_params, self.tvf_normalize_params, strict=True
        ):
            seen = tvf.center_crop(tvf.resize(image, **resize), **crop)
            parts.append(tvf.normalize(tvf.to_tensor(seen), **{**normalise, "inplace": False}))
        return torch.cat(parts)


def as_picture(image: Any, number: int = 0) -> Image.Image:
    """A colour picture.

    Args:
        image: a PIL image, or uint8[H, W, 3].
        number: which of several, for the message.

    Raises:
        InputError: it is neither.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    values = np.asarray(image)
    if values.dtype.kind == "f" and bool(np.isnan(values).any()):
        raise InputError(f"images[{number}] holds NaN; the camera image is damaged.")
    if values.dtype != np.uint8 or values.ndim != 3 or values.shape[-1] != 3 or 0 in values.shape:
        raise InputError(
            f"images[{number}] is {values.dtype} of shape {values.shape}; expected a PIL image or uint8[H, W, 3]."
        )
    return Image.fromarray(values)


def crop_area(image: Image.Image, share: float) -> Image.Image:
    """The middle of a picture, `share` of its area, scaled back to its size.

    As the LIBERO evaluation of OpenVLA does it: both sides shrink by the root of the share, and the corner pixels of
    the result lie on the corners of the cut (bilinear).
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    side = share**0.5
    matrix = torch.tensor([[[side, 0.0, 0.0], [0.0, side, 0.0]]])
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=True)
    cut = F.grid_sample(pixels, grid, mode="bilinear", align_corners=True).clamp(0, 1)
    values = (cut[0] * 255.5).floor().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(values.contiguous().numpy())


class PrismaticProcessor(ProcessorMixin):
    """Images and prompts to what the model takes; rows of a batch are padded on the left.

    Has the name that official checkpoints give; what they do not say is read from the model's `config.json`.

    Attributes:
        num_image_tokens: visual tokens per image.
        image_token_id: stands for each of them, behind the first token of a row.
        space_token_id: appended to a prompt that does not end with it (29871 in official models); None: nothing is.
        action_queries: placeholders at the end of every row, of chunk policies; 0 for others.
        action_token_id: their id.

    Raises:
        InputError: the tokenizer has no padding token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 256,
        image_token_id: int = 32001,
        space_token_id: int | None = 29871,
        action_queries: int = 0,
        action_token_id: int = 32002,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer)  # type: ignore[no-untyped-call]
        if tokenizer is not None and tokenizer.pad_token_id is None:
            raise InputError("the tokenizer has no padding token; OpenVLA's is '<PAD>'.")
        self.num_image_tokens = num_image_tokens
        self.image_token_id = image_token_id
        self.space_token_id = space_token_id
        self.action_queries = action_queries
        self.action_token_id = action_token_id

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Settings of a saved processor, completed by those of the model beside it."""
        settings, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "num_image_tokens" not in settings:
            from mmtoken.models.openvla.towers import count_patches  # needs timm

            fetching = ("cache_dir", "force_download", "token", "revision", "local_files_only", "subfolder")
            config = AutoConfig.from_pretrained(
                pretrained_model_name_or_path, **{name: kwargs[name] for name in fetching if name in kwargs}
            )
            if not isinstance(config, OpenVLAConfig):
                raise CheckpointError(f"config.json beside the processor is of model_type={config.model_type!r}.")
            settings = {
                **settings,
                "num_image_tokens": count_patches(config),
                "image_token_id": config.image_token_id,
                "space_token_id": config.space_token_id,
            }
            if isinstance(config, OpenVLAChunksConfig):
                settings |= {"action_queries": config.action_queries, "action_token_id": config.action_token_id}
        return settings, rest

    @staticmethod
    def prompt(instruction: str) -> str:
        """The prompt that OpenVLA was trained with.

        Raises:
            InputError: the instruction is empty.
        """
        if not instruction.strip():
            raise InputError("instruction is empty; say what the robot should do.")
        return f"In: What action should the robot take to {instruction.lower()}?\nOut:"

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """`input_ids` int[B, L], `attention_mask` int[B, L] and `pixel_values` float[B, 3 * towers, H, W].

        Args:
            text: one prompt per image, see `prompt`.
            images: see `PrismaticImageProcessor`.
            return_tensors: "pt".
            **kwargs: not used.

        Raises:
            InputError: not as many prompts as images, or one of them is not of its form.
        """
        if text is None or images is None:
            raise InputError("text and images belong together: give one prompt per image.")
        prompts = [text] if isinstance(text, str) else list(text)
        batch = self.image_processor(images, return_tensors=return_tensors)
        if len(prompts) != len(batch["pixel_values"]):
            raise InputError(f"{len(prompts)} prompts but {len(batch['pixel_values'])} images; give one per prompt.")
        rows = [self._tokens(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        after = mask.argmax(-1) + 1
        batch["input_ids"] = insert(ids, after, self.num_image_tokens, self.image_token_id)
        batch["attention_mask"] = insert(mask, after, self.num_image_tokens, 1)
        return BatchFeature(dict(batch))

    def _tokens(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        if not ids:
            raise InputError("a prompt has no tokens.")
        if self.space_token_id is not None and ids[-1] != self.space_token_id:
            ids = [*ids, self.space_token_id]
        return [*ids, *[self.action_token_id] * self.action_queries]

    @property
    def model_input_names(self) -> list[str]:
        """What a call returns."""
        return ["input_ids", "attention_mask", "pixel_values"]


for _config in (OpenVLAConfig, OpenVLAChunksConfig):
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": PrismaticImageProcessor, "torchvision": PrismaticImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(_config, PrismaticProcessor, exist_ok=True)
