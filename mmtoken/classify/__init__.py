"""Image classification by open_clip models, as they are or through a compressed tower."""

from mmtoken.classify.tca import Correction, Reservoir, TCAClassifier
from mmtoken.classify.zero_shot import zero_shot_logits

__all__ = ["Correction", "Reservoir", "TCAClassifier", "zero_shot_logits"]
