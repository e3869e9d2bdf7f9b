"""Actions as tokens: 256 bins at the end of the vocabulary, and the scale of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmtoken.errors import ActionError, InputError
from mmtoken.models.openvla.config import OpenVLAConfig, statistics_of


@dataclass(frozen=True)
class ActionCodec:
    """Continuous actions to token ids and back, as OpenVLA does it (arXiv 2406.09246, section 3.2).

    `bins` edges lie evenly in [-1, 1]; with V = `vocabulary`, an action in the d-th interval (1, 2, ...) is the token V
    - d, and stands for the centre of that interval. The last edge has no interval behind it, so its token stands for
    the last centre.

    Attributes:
        vocabulary: V, ids of the tokenizer; the action tokens are its last `bins`.
        bins: edges.
        norm_stats: per data set, see `OpenVLAConfig`.
    """

    vocabulary: int
    bins: int = 256
    norm_stats: dict[str, Any] | None = None

    @classmethod
    def of(cls, config: OpenVLAConfig) -> ActionCodec:
        """That of a model."""
        return cls(config.table_rows - config.pad_to_multiple_of, config.n_action_bins, config.norm_stats)

    @property
    def tokens(self) -> range:
        """The ids of action tokens."""
        return range(self.vocabulary - self.bins, self.vocabulary)

    def _edges(self, device: torch.device) -> Tensor:
        return torch.linspace(-1.0, 1.0, self.bins, dtype=torch.float64, device=device)

    def encode(self, normalised: Tensor) -> Tensor:
        """int64[..., A]: the tokens of actions float[..., A] in [-1, 1]; values outside count as its ends.

        Raises:
            InputError: a value is not a number.
        """
        if bool(normalised.isnan().any()):
            raise InputError("actions hold NaN, which is in no bin; clean the demonstrations.")
        interval = torch.bucketize(normalised.double().clamp(-1, 1), self._edges(normalised.device), right=True)
        return self.vocabulary - interval

    def decode(self, tokens: Tensor) -> Tensor:
        """float32[..., A] in [-1, 1]: what tokens int64[..., A] stand for.

        Raises:
            ActionError: a token is no action token.
        """
        self.check(tokens)
        edges = self._edges(tokens.device)
        centres = (edges[:-1] + edges[1:]) / 2
        return centres[(self.vocabulary - tokens - 1).clamp(0, self.bins - 2)].float()

    def check(self, tokens: Tensor) -> None:
        """Do nothing if all tokens are action tokens.

        Raises:
            ActionError: one is not; the message names it.
        """
        outside = (tokens < self.tokens.start) | (tokens >= self.tokens.stop)
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            rows = tuple(outside.flatten(1).any(1).nonzero()[:, 0].tolist()) if outside.ndim > 1 else ()
            raise ActionError(
                f"token {int(tokens[tuple(where)])} at {where} is no action: the bins are the tokens "
                f"{self.tokens.start} to {self.tokens.stop - 1}. The model "
                "did not answer with an action; check the prompt and the checkpoint.",
                rows,
            )

    def unnormalise(self, normalised: Tensor, unnorm_key: str | None = None) -> Tensor:
        """float32[..., A]: actions in the units of a data set, 0.5 (a + 1) (q99 - q01) + q01 where its mask says so.

        Args:
            normalised: float[..., A] in [-1, 1].
            unnorm_key: the data set; None: the only one.

        Raises:
            InputError: no such statistics, or not as many values as A.
        """
        low, high, mask = self._scale(normalised, unnorm_key)
        scaled = 0.5 * (normalised.double() + 1) * (high - low) + low
        return torch.where(mask, scaled, normalised.double()).float()

    def normalise(self, actions: Tensor, unnorm_key: str | None = None) -> Tensor:
        """float32[..., A]: the inverse of `unnormalise`, for demonstrations; not clipped to [-1, 1].

        Args:
            actions: float[..., A] in the units of the data set.
            unnorm_key: the data set; None: the only one.

        Raises:
            InputError: no such statistics, or not as many values as A.
        """
        low, high, mask = self._scale(actions, unnorm_key)
        span = torch.where(high > low, high - low, 1.0)
        return torch.where(mask, 2 * (actions.double() - low) / span - 1, actions.double()).float()

    def length(self, unnorm_key: str | None = None) -> int:
        """A, dimensions of an action.

        Raises:
            InputError: no such statistics.
        """
        return len(statistics_of(self.norm_stats, unnorm_key)["q01"])

    def _scale(self, actions: Tensor, unnorm_key: str | None) -> tuple[Tensor, Tensor, Tensor]:
        action = statistics_of(self.norm_stats, unnorm_key)
        size = len(action["q01"])
        if actions.shape[-1:] != (size,):
            raise InputError(
                f"actions have shape {tuple(actions.shape)} but the statistics of unnorm_key={unnorm_key!r} are for "
                f"{size} dimensions; choose the data set that the policy acts in."
            )
        mask = action.get("mask")
        low, high = (torch.tensor(action[name], dtype=torch.float64, device=actions.device) for name in ("q01", "q99"))
        chosen = torch.ones(size, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
        return low, high, chosen.to(actions.device)
