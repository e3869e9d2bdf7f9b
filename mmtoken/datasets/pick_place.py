"""`PickPlace`: pick up the named item and put it on the named base, as a Gymnasium environment.

The world is that of `mmtoken.datasets.tabletop`. The camera drifts and jitters, so what stands still moves in the
picture. An episode ends with success, or is cut off after `limit` steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any, SupportsFloat

import numpy as np
from numpy.typing import NDArray

from mmtoken.datasets.tabletop import (
    ACTIONS,
    SIZE,
    Camera,
    Frame,
    Order,
    Scene,
    draw_order,
    draw_scene,
    expert,
    move,
    placed,
    render,
)
from mmtoken.errors import InputError, UnsupportedError

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise UnsupportedError(
        "PickPlace needs gymnasium, which is not installed; run: pip install mmtoken[control]"
    ) from error

LIMIT = 28
"""Steps of an episode, about twice those of the expert."""
_ROUNDING = 1e-6


class PickPlace(gymnasium.Env[dict[str, Any], NDArray[np.float32]]):
    """The task.

    An observation is a dict of `image` uint8[64, 64, 3] and `instruction`, words. An action is float32[3] in [-1, 1]:
    dx and dy in steps of 5 px (to the right, down), and the grip (> 0 closes). The reward is 1 in the step that
    succeeds, 0 before; the info holds `success` and `steps`.

    Args:
        limit: steps after which an episode is cut off.
        render_mode: "rgb_array", what the policy sees, or None.

    Raises:
        InputError: limit is not a positive whole number, or the render mode is unknown.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012, Gymnasium's own

    def __init__(self, limit: int = LIMIT, render_mode: str | None = None) -> None:
        if not isinstance(limit, int) or limit < 1:
            raise InputError(f"limit={limit!r}: give the number of steps after which an episode is cut off, 1 or more.")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode={render_mode!r}: use 'rgb_array' or None.")
        self.limit, self.render_mode = limit, render_mode
        self.action_space = spaces.Box(-1.0, 1.0, (len(ACTIONS),), np.float32)
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
                "instruction": spaces.Text(100, charset=ascii_lowercase + " "),
            }
        )
        self._scene: Scene | None = None
        self._order = Order(0, 0)
        self._steps, self._over = 0, True

    @property
    def scene(self) -> Scene:
        """The state of the world, which a policy does not see.

        Raises:
            InputError: the environment was never reset.
        """
        if self._scene is None:
            raise InputError("env: there is no episode yet; call reset() first.")
        return self._scene

    @property
    def order(self) -> Order:
        """What the instruction asks for."""
        return self._order

    def expert_action(self) -> NDArray[np.float32]:
        """What the scripted expert would do now, float32[3]."""
        return expert(self.scene, self._order)

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new episode; a function of the seed, if one is given.

        Args:
            seed: of the scene, the instruction and the camera; None: go on with the generator as it is.
            options: none are known.

        Raises:
            InputError: options are given.
        """
        if options:
            raise InputError(f"options={dict(options)!r}: PickPlace has none; leave them out.")
        super().reset(seed=seed)
        self._scene = draw_scene(self.np_random)
        self._order = draw_order(self.np_random, self._scene)
        self._camera = Camera.draw(self.np_random)
        self._steps, self._over = 0, False
        self._look()
        return self._observation(), self._info()

    def step(self, action: NDArray[np.float32]) -> tuple[dict[str, Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """Move, then grip.

        Args:
            action: float32[3] in [-1, 1].

        Returns:
            Observation, reward, whether it succeeded, whether it was cut off, and info.

        Raises:
            InputError: the action has another shape, holds NaN, or leaves [-1, 1]; the episode is over, or none began.
        """
        scene = self.scene
        if self._over:
            raise InputError(f"env: the episode ended after {self._steps} steps; call reset() to begin another.")
        self._scene = move(scene, _checked(action))
        self._steps += 1
        self._look()
        success = placed(self._scene, self._order)
        cut = not success and self._steps >= self.limit
        self._over = success or cut
        return self._observation(), float(success), success, cut, self._info()

    def render(self) -> Frame | None:
        """The last picture, uint8[64, 64, 3], in mode "rgb_array"."""
        return self._image.copy() if self.render_mode == "rgb_array" and self._scene is not None else None

    def _look(self) -> None:
        self._image = render(self.scene, self._camera.shift(self._steps, self.np_random))

    def _observation(self) -> dict[str, Any]:
        return {"image": self._image.copy(), "instruction": self._order.text(self.scene)}

    def _info(self) -> dict[str, Any]:
        return {"success": placed(self.scene, self._order), "steps": self._steps}


def _checked(action: Any) -> NDArray[np.float32]:
    """The action, if it is one; rounding errors beyond [-1, 1] are cut off."""
    try:
        values = np.asarray(action, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"action={action!r}: give {len(ACTIONS)} numbers (dx, dy, grip) in [-1, 1].") from error
    if values.shape != (len(ACTIONS),):
        raise InputError(f"action has shape {values.shape}; give {len(ACTIONS)} numbers (dx, dy, grip) in [-1, 1].")
    if not np.isfinite(values).all():
        raise InputError(f"action={values.tolist()}: holds NaN or infinity; give numbers in [-1, 1].")
    if np.abs(values).max() > 1 + _ROUNDING:
        raise InputError(f"action={values.tolist()}: leaves [-1, 1]; clip it, or check the policy's un-normalisation.")
    return np.clip(values, -1, 1)
