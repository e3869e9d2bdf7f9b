"""Bare models with the weights of a golden case."""

from __future__ import annotations

from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from tests.golden.case import GoldenCase


def llama(case: GoldenCase, attention: str = "sdpa") -> LlamaForCausalLM:
    """The case's decoder; every weight of the file is used. Of files without a head nobody reads the logits."""
    weights = case.weights()
    embedding = weights["model.embed_tokens.weight"]
    config = LlamaConfig(**{"vocab_size": len(embedding), **case.config})
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict({"lm_head.weight": embedding, **weights})
    return model


def clip_tower(case: GoldenCase) -> CLIPVisionModel:
    """The case's tower. Files carry the names of transformers 4; later versions dropped the leading `vision_model.`."""
    model = CLIPVisionModel(CLIPVisionConfig(**case.config)).eval()
    weights = case.weights()
    if not any(name.startswith("vision_model.") for name in model.state_dict()):
        weights = {name.removeprefix("vision_model."): value for name, value in weights.items()}
    model.load_state_dict(weights)
    return model
