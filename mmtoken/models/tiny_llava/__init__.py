"""tiny-llava: a LLaVA small enough to train on one CPU core in about an hour and to ship with the package."""

from mmtoken.models.tiny_llava.export import export
from mmtoken.models.tiny_llava.network import NetworkConfig, build_network
from mmtoken.models.tiny_llava.objective import TinyLlava
from mmtoken.models.tiny_llava.processor import build_processor

__all__ = ["NetworkConfig", "TinyLlava", "build_network", "build_processor", "export"]
