"""An episode of a policy: one camera and one instruction after the other, with a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtoken.compressors.base import Compressor
from mmtoken.compressors.registry import resolve
from mmtoken.compressors.trained import Trained
from mmtoken.control.policy import Image, Policy
from mmtoken.engine.recorder import EpisodeState
from mmtoken.engine.report import Report
from mmtoken.engine.session import attached, check, compress
from mmtoken.errors import InputError, MMTokenError


class Episode(AbstractContextManager["Episode"]):
    """Acts with a policy, step by step, and prunes what the compressor lets go of each camera picture.

    The compressor is on the model while `act` runs and at no other time, and an episode keeps what it remembers of its
    earlier steps to itself: episodes of one policy, also with other compressors, may take turns, and the policy's model
    stays plain between calls. Steps of one policy wait for each other (`Policy.lock`), so that episodes may run in
    several threads; one episode belongs to one thread at a time.

    Methods that look back (VLA-Pruner) prune nothing in an episode's first steps, where the logits are bit for bit
    those of the plain model; `reset` begins there again.

    Attributes:
        policy: as handed in.
        compressor: None for the plain policy.
        steps: steps since the episode began.
    """

    def __init__(self, policy: Policy, compressor: Compressor | Trained | str | dict[str, Any] | None = None) -> None:
        """Begin.

        Args:
            policy: what acts.
            compressor: an instance, a name, or {"class_path": ..., "init_args": ...}; None prunes nothing.

        Raises:
            UnsupportedError: the policy's model cannot host the compressor; the message says why.
        """
        self.policy = policy
        self.compressor = None if compressor is None else resolve(compressor)
        with policy.lock:
            model = policy.model
            if self.compressor is not None:
                check(model, self.compressor)
        self.steps = 0
        self._state: EpisodeState | None = EpisodeState()
        self._shape: tuple[int, ...] | None = None
        self._count: int | None = None
        self._report: Report | None = None

    def act(self, image: Image | Sequence[Image], instruction: str | Sequence[str]) -> NDArray[np.float32]:
        """The next action.

        Lists of images and instructions run as many episodes in lockstep; the first step fixes how many.

        Args:
            image: uint8[H, W, 3], the same size in every step; or one per episode.
            instruction: in words; or one per episode.

        Returns:
            float32[A] in the robot's units, float32[S, A] of a policy that predicts S > 1 steps at once; with lists
            one row per episode in front.

        Raises:
            InputError: an image or an instruction cannot be used, or does not fit the episode; nothing is remembered.
            MMTokenError: the episode is closed, its policy unloaded, or a compressor is attached to its model already.
        """
        state = self._open()
        single = isinstance(instruction, str)
        images: list[Any] = [image] if single else list(image)
        instructions = [instruction] if isinstance(instruction, str) else list(instruction)
        with self.policy.lock:
            if attached(self.policy.model) is not None:
                raise MMTokenError(
                    "the policy's model already has a compressor attached; detach it: an episode does so."
                )
            self.policy.check(images, instructions)
            self._check_fits(images)
            if self.compressor is None:
                actions = self.policy.predict(images, instructions)
            else:
                with compress(self.policy.model, self.compressor) as session, session.resuming(state):
                    actions = self.policy.predict(images, instructions)
                    self._report = session.report
        self._count, self._shape = len(images), np.shape(images[0])
        self.steps += 1
        if actions.shape[1] == 1:
            actions = actions[:, 0]
        return actions[0] if single else actions

    def only(self, rows: Sequence[int]) -> None:
        """Go on with some of the episodes that run in lockstep, in this order; the others have ended.

        Args:
            rows: numbers of episodes, as they stood in the last step.

        Raises:
            InputError: there is no such episode, or one is named twice.
        """
        state, chosen = self._open(), list(rows)
        count = self._count or 0
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= row < count for row in chosen):
            raise InputError(f"rows={chosen}; give some of the numbers below {count}, each once.")
        state.calls = [call[chosen] for call in state.calls]
        self._count = len(chosen)

    def reset(self) -> None:
        """Begin anew: nothing of earlier steps is remembered, and camera and number of episodes may be others."""
        self._open()
        self._state, self._shape, self._count, self._report = EpisodeState(), None, None, None
        self.steps = 0

    @property
    def report(self) -> Report:
        """Measurements of the last step.

        Raises:
            MMTokenError: nothing was measured: no step yet, or no compressor.
        """
        if self._report is None:
            why = "no compressor was given" if self.compressor is None else "no step was taken since the episode began"
            raise MMTokenError(f"report is empty: {why}; call act() of an episode with a compressor first.")
        return self._report

    @property
    def history(self) -> NDArray[np.float32]:
        """float32[h, B, N]: attention that the actions of remembered steps paid to visual tokens, oldest step first.

        Empty for compressors that do not look back.
        """
        calls = self._open().calls
        return np.stack([call.float().cpu().numpy() for call in calls]) if calls else np.zeros((0, 0, 0), np.float32)

    def close(self) -> None:
        """Let go of what is remembered; safe to repeat. The policy stays loaded."""
        self._state = None

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> EpisodeState:
        if self._state is None:
            raise MMTokenError("episode is closed; make another Episode of the same policy.")
        return self._state

    def _check_fits(self, images: Sequence[Any]) -> None:
        shape = np.shape(images[0])
        if self._shape is not None and shape != self._shape:
            raise InputError(
                f"image is {list(shape)} and the episode began with {list(self._shape)}: what is remembered of earlier "
                "steps belongs to places in the picture. Keep the camera, or call reset()."
            )
        if self._count is not None and len(images) != self._count:
            raise InputError(
                f"image and instruction are {len(images)} and the episode has {self._count}; call only() when some of "
                "them have ended, or reset()."
            )
