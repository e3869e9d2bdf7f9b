"""tiny-document: an Idefics3 that reads generated pages, small enough to train on one CPU thread in 20 minutes."""

from mmtoken.models.tiny_document.export import export
from mmtoken.models.tiny_document.network import NetworkConfig, build_network
from mmtoken.models.tiny_document.objective import TinyDocument
from mmtoken.models.tiny_document.processor import build_processor

__all__ = ["NetworkConfig", "TinyDocument", "build_network", "build_processor", "export"]
