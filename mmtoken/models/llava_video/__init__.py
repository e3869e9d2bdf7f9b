"""LLaVA-Video: LLaVA-OneVision whose video frames end every row with a newline token."""

from mmtoken.models.llava_video.network import LlavaVideoConfig as LlavaVideoConfig
from mmtoken.models.llava_video.network import LlavaVideoForConditionalGeneration as LlavaVideoForConditionalGeneration
from mmtoken.models.llava_video.processor import LlavaVideoProcessor as LlavaVideoProcessor
