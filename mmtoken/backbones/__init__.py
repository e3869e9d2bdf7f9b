"""One small adapter per Hugging Face model family."""

from mmtoken.backbones.base import Backbone, Layout, Tower
from mmtoken.backbones.registry import adapt

__all__ = ["Backbone", "Layout", "Tower", "adapt"]
