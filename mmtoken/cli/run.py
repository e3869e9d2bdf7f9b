"""`mmtoken run`: ask a question about one or more images, with or without a compressor."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any

from mmtoken.cli.parser import Parser, add_compressor, find_device, quiet, take_compressor
from mmtoken.compressors.base import Compressor
from mmtoken.compressors.trained import Trained
from mmtoken.errors import InputError, MMTokenError
from mmtoken.wholefile import check_target, whole_file

_STAGES = ("vision", "scoring", "prefill")


def main(argv: list[str]) -> int:
    """Run `mmtoken run` with the arguments after the sub-command; 0 on success.

    Raises:
        MMTokenError: an argument, an image or the model cannot be used.
    """
    parser = Parser("mmtoken run", __doc__ or "")
    parser.add_argument(
        "--image", nargs="+", action="extend", required=True, metavar="FILE", help="pictures, in prompt order"
    )
    parser.add_argument("--ask", required=True, metavar="TEXT", help="the question")
    parser.add_argument("--model", metavar="NAME", help="zoo entry, folder or Hugging Face id; default: tiny-llava")
    add_compressor(parser)
    parser.add_argument("--save-overlay", metavar="PNG", help="draw which patches were kept")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--json", action="store_true", help="answer and report as JSON")
    options, compressor = take_compressor(parser, argv)
    # Whatever can be refused is refused before a model is loaded.
    if options.max_new_tokens < 1:
        raise InputError(f"max-new-tokens={options.max_new_tokens}; give at least 1.")
    if not options.ask.strip():
        raise InputError("ask='' is empty; give a question.")
    if options.save_overlay:
        if compressor is None:
            raise InputError("save-overlay shows what a compressor kept; name one with --compressor.")
        check_target(options.save_overlay, "save-overlay", ".png")
    from mmtoken.datasets.media.images import read_image

    images = [read_image(file) for file in options.image]
    with quiet():
        result = _answer(options, compressor, images)
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(result)) + "\n")
    return 0


def _answer(options: Any, compressor: Any, images: list[Any]) -> dict[str, Any]:
    import torch

    from mmtoken.backbones.registry import adapt
    from mmtoken.engine.session import attached, compress
    from mmtoken.evaluation.overlay import overlays, side_by_side
    from mmtoken.hub import load

    device = find_device(options.device)
    model, processor = load(options.model)
    model.to(device)
    saved = attached(model)
    if saved is not None and compressor is not None:  # what is named here goes before what was saved
        saved.detach()
        saved = None
    trained = compressor if saved is None else saved.trained
    if isinstance(trained, Trained):
        trained.to(device)
    before = isinstance(compressor, Compressor) and "prepare" in compressor.sites and adapt(model).dynamic_resolution
    if before:
        if options.save_overlay:
            raise InputError(
                f"save-overlay={options.save_overlay!r}: {type(compressor).__name__} makes the image smaller before "
                "this model sees it and drops no patch; leave the overlay out."
            )
        images = compressor.prepare(images)
    inputs = _inputs(processor, options.ask, images, device)
    attach = compressor is not None and not before
    with compress(model, compressor) if attach else nullcontext(saved) as session, torch.no_grad():
        output = _generate(model, inputs, options.max_new_tokens)
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    placeholder = adapt(model).placeholder_ids("image")
    result: dict[str, Any] = {
        "answer": answer,
        "compressor": None if compressor is None else compressor.to_dict(),
        "visual_tokens": int((inputs["input_ids"] == placeholder).sum()),
    }
    if session is not None:
        result["report"] = session.reports[0].to_dict()
    if options.save_overlay and session is not None:
        with whole_file(options.save_overlay) as temporary:
            side_by_side(overlays(session.reports[0], images, processor)).save(temporary)
        result["overlay"] = options.save_overlay
    return result


def _inputs(processor: Any, question: str, images: list[Any], device: Any) -> dict[str, Any]:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[images], return_tensors="pt")
    except Exception as error:  # templates are programs of the checkpoint's makers
        reason = " ".join(str(error).split()) or type(error).__name__
        short = question if len(question) <= 60 else f"{question[:60]}..."
        raise InputError(
            f"ask={short!r} with {len(images)} images is refused by this model's processor ({reason}); leave image "
            "tokens out of the question, give one image, or take another model."
        ) from error
    return {name: value.to(device) for name, value in inputs.items()}


def _generate(model: Any, inputs: dict[str, Any], new_tokens: int) -> Any:
    try:
        return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    except MMTokenError:
        raise
    except ValueError as error:
        if "do not match" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise InputError(
            f"image: the prompt of this model's processor does not hold every image ({reason}); its chat template is "
            "at fault, or give fewer images."
        ) from error


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [result["answer"], ""]
    report = result.get("report")
    if report is None:
        return [*lines, f"visual tokens  {result['visual_tokens']}"]
    kept, seen = sum(report["tokens_out"]), sum(report["tokens_in"])
    lines += [
        f"compressor     {report['compressor']}",
        f"visual tokens  {seen} -> {kept} (layer average {report['layer_average'] * len(report['tokens_in']):.1f})",
        f"prefill FLOPs  {report['flops_dense']:.3g} -> {report['flops']:.3g}",
        f"KV cache       {report['kv_bytes_dense'] / 1024:.1f} -> {report['kv_bytes'] / 1024:.1f} KiB",
        "times          " + ", ".join(f"{stage} {1e3 * report[f'{stage}_seconds']:.1f} ms" for stage in _STAGES),
        *(f"note           {note}" for note in report["notes"]),
    ]
    if "overlay" in result:
        lines.append(f"overlay        {result['overlay']}")
    return lines
