"""Compressors: one paper, one file."""

from mmtoken.compressors.base import Compressor, Context
from mmtoken.compressors.controls import Downscale, Random, UniformGrid
from mmtoken.compressors.dart import DART
from mmtoken.compressors.divprune import DivPrune
from mmtoken.compressors.fastv import FastV
from mmtoken.compressors.pyramiddrop import PyramidDrop
from mmtoken.compressors.sparsevlm import SparseVLM, SparseVLMPlus
from mmtoken.compressors.tokencorr import TokenCorr
from mmtoken.compressors.tome import ToMe
from mmtoken.compressors.trained import Trained
from mmtoken.compressors.transprune import TransPrune
from mmtoken.compressors.visionzip import VisionZip
from mmtoken.compressors.vlapruner import VLAPruner

__all__ = [
    "DART",
    "Compressor",
    "Context",
    "DivPrune",
    "Downscale",
    "FastV",
    "PyramidDrop",
    "Random",
    "SparseVLM",
    "SparseVLMPlus",
    "ToMe",
    "TokenCorr",
    "Trained",
    "TransPrune",
    "UniformGrid",
    "VLAPruner",
    "VisionZip",
]
