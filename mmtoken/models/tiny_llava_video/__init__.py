"""tiny-llava-video: tiny-llava taught to watch clips, small enough to ship with the package."""

from mmtoken.models.tiny_llava.network import NetworkConfig
from mmtoken.models.tiny_llava_video.export import export
from mmtoken.models.tiny_llava_video.network import build_network, from_tiny_llava
from mmtoken.models.tiny_llava_video.objective import TinyLlavaVideo
from mmtoken.models.tiny_llava_video.processor import build_processor

__all__ = ["NetworkConfig", "TinyLlavaVideo", "build_network", "build_processor", "export", "from_tiny_llava"]
