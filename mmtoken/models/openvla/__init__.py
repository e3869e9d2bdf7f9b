"""OpenVLA: a robot policy that answers an image and an instruction with action tokens."""

from mmtoken.models.openvla.actions import ActionCodec as ActionCodec
from mmtoken.models.openvla.chunks import OpenVLAForActionChunks as OpenVLAForActionChunks
from mmtoken.models.openvla.config import OpenVLAChunksConfig as OpenVLAChunksConfig
from mmtoken.models.openvla.config import OpenVLAConfig as OpenVLAConfig
from mmtoken.models.openvla.network import OpenVLAForActionPrediction as OpenVLAForActionPrediction
from mmtoken.models.openvla.processor import PrismaticImageProcessor as PrismaticImageProcessor
from mmtoken.models.openvla.processor import PrismaticProcessor as PrismaticProcessor

OpenVLAProcessor = PrismaticProcessor
"""The same class; upstream's name is the one that checkpoints give."""
