"""Compressors: one paper, one file."""

from mmtoken.compressors.base import Compressor, Context
from mmtoken.compressors.bus import BUS
from mmtoken.compressors.cdpruner import CDPruner
from mmtoken.compressors.compose import Schedule, Sequential
from mmtoken.compressors.controls import Downscale, Random, UniformGrid
from mmtoken.compressors.dart import DART
from mmtoken.compressors.divprune import DivPrune
from mmtoken.compressors.dycoke import DyCoke
from mmtoken.compressors.expectedattention import ExpectedAttention
from mmtoken.compressors.fastv import FastV
from mmtoken.compressors.flowcut import FlowCut, FlowCutHR
from mmtoken.compressors.holov import HoloV
from mmtoken.compressors.keydiff import KeyDiff
from mmtoken.compressors.knorm import Knorm
from mmtoken.compressors.prumerge import PruMerge
from mmtoken.compressors.pyramiddrop import PyramidDrop
from mmtoken.compressors.quecc import QueCC
from mmtoken.compressors.regionmask import RegionMask
from mmtoken.compressors.snapkv import SnapKV
from mmtoken.compressors.sparsevlm import SparseVLM, SparseVLMPlus
from mmtoken.compressors.tca import TCA
from mmtoken.compressors.tokencorr import TokenCorr
from mmtoken.compressors.tome import ToMe
from mmtoken.compressors.tova import TOVA
from mmtoken.compressors.trained import Trained
from mmtoken.compressors.transprune import TransPrune
from mmtoken.compressors.trips import TRIPS
from mmtoken.compressors.visionzip import VisionZip
from mmtoken.compressors.vispruner import VisPruner
from mmtoken.compressors.vlapruner import VLAPruner
from mmtoken.compressors.zerotprune import ZeroTPrune

__all__ = [
    "BUS",
    "DART",
    "TCA",
    "TOVA",
    "TRIPS",
    "CDPruner",
    "Compressor",
    "Context",
    "DivPrune",
    "Downscale",
    "DyCoke",
    "ExpectedAttention",
    "FastV",
    "FlowCut",
    "FlowCutHR",
    "HoloV",
    "KeyDiff",
    "Knorm",
    "PruMerge",
    "PyramidDrop",
    "QueCC",
    "Random",
    "RegionMask",
    "Schedule",
    "Sequential",
    "SnapKV",
    "SparseVLM",
    "SparseVLMPlus",
    "ToMe",
    "TokenCorr",
    "Trained",
    "TransPrune",
    "UniformGrid",
    "VLAPruner",
    "VisPruner",
    "VisionZip",
    "ZeroTPrune",
]
