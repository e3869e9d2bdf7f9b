"""A vision-language-action policy: camera pictures and instructions in, actions in the robot's units out."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtoken.errors import ActionError, InputError, MMTokenError

Image = NDArray[np.uint8]
"""uint8[H, W, 3]."""


class Policy:
    """A policy model with its processor and the statistics that turn its actions into the robot's units.

    Nothing is an action that was not meant as one: what cannot be used is an error, before the model runs where it can
    be told by then, and a token that is no action bin is one afterwards.

    Attributes:
        processor: as handed in.
        unnorm_key: the data set whose statistics scale the actions; None: the only one.
        codec: tokens to actions and back.
        action_length: A, numbers of an action.
        lock: held while the model runs: a compressor is attached to the model for one step of one episode at a time.
    """

    def __init__(self, model: Any, processor: Any, *, unnorm_key: str | None = None) -> None:
        """Take a model into use.

        Args:
            model: an OpenVLA, or its chunk policy, as `mmtoken.load` gives it.
            processor: that belongs to it.
            unnorm_key: a key of the model's `norm_stats`; may be left out where there is only one.

        Raises:
            MMTokenError: there are no such statistics, or they do not fit the model's actions.
        """
        self.processor = processor
        self.unnorm_key = unnorm_key
        self.codec = model.codec
        self.action_length = self.codec.length(unnorm_key)
        self.lock = threading.RLock()
        self._model = model

    @property
    def model(self) -> Any:
        """The model.

        Raises:
            MMTokenError: the policy was unloaded.
        """
        if self._model is None:
            raise MMTokenError("policy was unloaded; load the model again and make a new Policy and new episodes.")
        return self._model

    @torch.no_grad()
    def predict(self, images: Sequence[Image], instructions: Sequence[str]) -> NDArray[np.float32]:
        """Actions for several pictures at once.

        Args:
            images: uint8[H, W, 3], all of one size.
            instructions: one for each image, in words.

        Returns:
            float32[B, S, A]: S steps (1 for policies that predict one at a time) of A numbers in the robot's units.

        Raises:
            ActionError: what the model answers is no action.
            InputError: an image or an instruction cannot be used.
            MMTokenError: the policy was unloaded.
        """
        with self.lock:
            model = self.model
            self.check(images, instructions)
            prompts = [self.processor.prompt(instruction) for instruction in instructions]
            inputs = self.processor(text=prompts, images=[np.asarray(image) for image in images])
            tokens = model.predict_tokens(unnorm_key=self.unnorm_key, **inputs.to(model.device))
            scaled = self.codec.unnormalise(self.codec.decode(tokens), self.unnorm_key)
            actions: NDArray[np.float32] = scaled.cpu().numpy()
        if not np.isfinite(actions).all():
            raise ActionError(f"actions are not finite: {actions.tolist()}; check norm_stats of the checkpoint.")
        return actions

    def unload(self) -> None:
        """Let go of the model; safe to repeat. The policy and its episodes cannot be used any more."""
        with self.lock:
            self._model = None

    @staticmethod
    def check(images: Sequence[Any], instructions: Sequence[str]) -> None:
        """Do nothing if these are images and instructions.

        Raises:
            InputError: one of them is not; the message says which and why.
        """
        if len(images) == 0 or len(images) != len(instructions):
            raise InputError(
                f"images and instructions are {len(images)} and {len(instructions)}; give one instruction per image, "
                "and at least one."
            )
        shapes = [_check_image(number, image) for number, image in enumerate(images)]
        for number, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise InputError(
                    f"image {number} is {list(shape)} and image 0 is {list(shapes[0])}; pictures of one call must have "
                    "the same size."
                )
        for number, instruction in enumerate(instructions):
            if not isinstance(instruction, str) or not instruction.strip():
                raise InputError(f"instruction {number} is {instruction!r}; say in words what to do.")


def _check_image(number: int, image: Any) -> tuple[int, ...]:
    """The shape of an image, if it is one."""
    values = np.asarray(image)
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise InputError(f"image {number} holds NaN or infinity: the camera gave no picture. Give uint8[H, W, 3].")
    if values.dtype != np.uint8:
        raise InputError(f"image {number} is {values.dtype}; give uint8[H, W, 3] with values from 0 to 255.")
    if values.ndim != 3 or values.shape[2] != 3:
        raise InputError(
            f"image {number} has shape {list(values.shape)}; give uint8[H, W, 3] in the order red, green, blue."
        )
    if 0 in values.shape:
        raise InputError(f"image {number} has shape {list(values.shape)}, which holds no pixel; give a picture.")
    return values.shape
