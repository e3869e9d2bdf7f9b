"""Compressors: one paper, one file."""

from mmtoken.compressors.base import Compressor, Context
from mmtoken.compressors.controls import Downscale, Random, UniformGrid
from mmtoken.compressors.divprune import DivPrune
from mmtoken.compressors.fastv import FastV
from mmtoken.compressors.pyramiddrop import PyramidDrop
from mmtoken.compressors.tokencorr import TokenCorr
from mmtoken.compressors.tome import ToMe
from mmtoken.compressors.visionzip import VisionZip

__all__ = [
    "Compressor",
    "Context",
    "DivPrune",
    "Downscale",
    "FastV",
    "PyramidDrop",
    "Random",
    "ToMe",
    "TokenCorr",
    "UniformGrid",
    "VisionZip",
]
