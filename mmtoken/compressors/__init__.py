"""Compressors: one paper, one file."""

from mmtoken.compressors.base import Compressor, Context
from mmtoken.compressors.bus import BUS
from mmtoken.compressors.controls import Downscale, Random, UniformGrid
from mmtoken.compressors.divprune import DivPrune
from mmtoken.compressors.fastv import FastV
from mmtoken.compressors.pyramiddrop import PyramidDrop
from mmtoken.compressors.quecc import QueCC
from mmtoken.compressors.tome import ToMe
from mmtoken.compressors.trained import Trained
from mmtoken.compressors.trips import TRIPS
from mmtoken.compressors.visionzip import VisionZip

__all__ = [
    "BUS",
    "TRIPS",
    "Compressor",
    "Context",
    "DivPrune",
    "Downscale",
    "FastV",
    "PyramidDrop",
    "QueCC",
    "Random",
    "ToMe",
    "Trained",
    "UniformGrid",
    "VisionZip",
]
