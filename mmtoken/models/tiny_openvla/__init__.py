"""tiny-openvla: an OpenVLA small enough to train on one CPU core in a quarter of an hour, for `PickPlace`."""

from mmtoken.models.tiny_openvla.export import export
from mmtoken.models.tiny_openvla.network import NetworkConfig, build_network
from mmtoken.models.tiny_openvla.objective import TinyOpenVLA
from mmtoken.models.tiny_openvla.processor import build_processor

__all__ = ["NetworkConfig", "TinyOpenVLA", "build_network", "build_processor", "export"]
