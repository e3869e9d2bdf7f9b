"""TCA's test-time adaptation: a zero-shot classifier that remembers confident images of each class.

Wang et al., Is Less More? Exploring Token Condensation as Training-free Test-time Adaptation, ICCV 2025, arXiv
2410.14729. Nothing is trained. Per class a few images are held by the states of CLS after every block of the tower;
once every class has two, their means attend as anchors where tokens are condensed; and what is held corrects logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmtoken.classify.zero_shot import check_classifier, zero_shot_logits
from mmtoken.compressors import TCA
from mmtoken.engine.class_states import class_states
from mmtoken.engine.session import check, compress
from mmtoken.errors import InputError, MMTokenError


@dataclass(frozen=True)
class Correction:
    """How images that are held correct the logits of another one. The paper tunes all four per test set.

    Attributes:
        size: images held per class, M.
        scale: how evenly the tower's blocks weigh, s: toward 0 the last block alone counts, large values all alike.
        strength: how much an image with the very same states adds to its class, lambda; 0: plain CLIP.
        sharpness: how fast that falls as states differ, beta.
    """

    size: int = 3
    scale: float = 0.1
    strength: float = 3.0
    sharpness: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise MMTokenError(f"size={self.size!r} holds no images; give an int of at least 1.")
        for name, lowest in (("scale", 1e-6), ("strength", 0.0), ("sharpness", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < float("inf"):
                raise MMTokenError(f"{name}={value!r} is out of range; give a number of at least {lowest:g}.")


class Entry(NamedTuple):
    """An image that is held: the entropy of its prediction, and CLS after every block, float[L, D]."""

    entropy: float
    states: Tensor


class Reservoir:
    """What is held of earlier images, per predicted class.

    Attributes:
        classes: their number C.
        settings: how many are held, and what they do.
        held: per class its images, oldest first.
    """

    def __init__(self, classes: int, settings: Correction) -> None:
        self.classes, self.settings = classes, settings
        self.held: list[list[Entry]] = [[] for _ in range(classes)]

    def add(self, label: int, entropy: float, states: Tensor) -> None:
        """Hold an image; of more than `size`, the one leaves that is least certain and most like the others.

        Args:
            label: its predicted class.
            entropy: of the prediction, in nats.
            states: float[L, D].
        """
        images = self.held[label]
        images.append(Entry(entropy, states.detach()))
        if len(images) <= self.settings.size:
            return
        means = nn.functional.normalize(torch.stack([image.states.mean(0) for image in images]), dim=-1)
        alike = means @ means.T
        others = (alike.sum(-1) - alike.diagonal()) / (len(images) - 1)
        entropies = torch.tensor([image.entropy for image in images], device=others.device)
        del images[int((entropies + others).argmax())]

    def anchors(self) -> dict[int, Tensor]:
        """float[C, D] per block that the anchors enter: mean states after the block before; empty as long as a class
        has fewer than two images."""
        if min(len(images) for images in self.held) < 2:
            return {}
        means = torch.stack([torch.stack([image.states for image in images]).mean(0) for images in self.held], 1)
        return {number + 1: bank for number, bank in enumerate(means[:-1])}

    def correction(self, states: Tensor) -> Tensor:
        """float32[C], what is added to the logits of an image with CLS states float[L, D]."""
        settings = self.settings
        depths = torch.linspace(0, 1, len(states), device=states.device)
        weights = (depths / settings.scale).softmax(0)
        added = torch.zeros(self.classes, device=states.device)
        for label, images in enumerate(self.held):
            for image in images:
                affinity = weights @ nn.functional.cosine_similarity(states.float(), image.states.float(), dim=-1)
                added[label] += settings.strength * torch.exp(-settings.sharpness * (1 - affinity))
        return added


class TCAClassifier:
    """A zero-shot classifier through a tower that condenses tokens, which adapts to the images that it is shown.

    ```python
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, classes, templates)
    classifier = TCAClassifier(model, weights)
    logits = classifier(images)
    classifier.reset()  # before another test set
    ```

    Images are taken one after the other, and each sees what was held before and itself: results depend on their order,
    and not on how they are batched. The model is left as it was after every call.

    Args:
        model: an open_clip `CLIP` or `CustomTextCLIP` whose tower has CLS.
        weights: float[D, C], see `zero_shot_logits`.
        compressor: the condensation.
        settings: what is held and what that adds.

    Raises:
        UnsupportedError: the model is no such one, or cannot host the compressor.
        InputError: weights have another shape.
    """

    def __init__(
        self, model: Any, weights: Tensor, compressor: TCA | None = None, settings: Correction | None = None
    ) -> None:
        check_classifier(model, weights)
        self.model, self.weights = model, weights
        self.compressor = TCA(drop=0.1) if compressor is None else compressor
        self.settings = Correction() if settings is None else settings
        check(model, self.compressor)
        with class_states(model):
            pass
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.reservoir = Reservoir(self.weights.shape[1], self.settings)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Corrected logits float[n, C] of images float[n, 3, H, W], in order.

        Raises:
            InputError: images have another shape.
        """
        if images.ndim != 4 or not len(images):
            raise InputError(f"images has shape {tuple(images.shape)}; expected float[n, 3, H, W] with n > 0.")
        with compress(self.model, self.compressor) as session:
            return torch.cat([self._classify(session, image[None]) for image in images])

    def _classify(self, session: Any, image: Tensor) -> Tensor:
        memory = {"anchors": self.reservoir.anchors()}
        with session.remembering(memory), class_states(self.model) as noted:
            logits = zero_shot_logits(self.model, image, self.weights)
        states = torch.stack(noted)[:, 0]
        # The image counts for itself, as in the released code.
        self.reservoir.add(int(logits.argmax()), float(entropy(logits[0])), states)
        return logits + self.reservoir.correction(states).to(logits.dtype)


def entropy(logits: Tensor) -> Tensor:
    """float[]: of the softmax of logits float[C], in nats."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
