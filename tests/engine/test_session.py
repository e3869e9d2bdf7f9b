"""Attaching leaves nothing behind, whatever happens in between, and touches no other model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mmtoken import attach, compress
from mmtoken.compressors import DivPrune, FastV, PyramidDrop, Random, ToMe, UniformGrid, VisionZip
from mmtoken.compressors.base import Compressor, Context, Need, Positions
from mmtoken.engine import session as session_module
from mmtoken.errors import MMTokenError, UnsupportedError
from mmtoken.tokens import VisualTokens
from tests import oracle
from tests.backbones.tiny_models import build, config, inputs
from tests.engine.agreement import BEFORE_DECODER, INSIDE_DECODER, assert_close, cells, hosts, tiny

EVERY = BEFORE_DECODER | INSIDE_DECODER
REGISTERED = ("registry.attention.mmtoken_", "registry.mask.mmtoken_")
"""The tapped attention stays in transformers' registries, under a name of its own."""


@contextmanager
def leaves_nothing(model: nn.Module) -> Iterator[None]:
    """The body must leave model, configs, classes and registries as they were."""
    hooks, before = oracle.hook_count(model), oracle.fingerprint(model)
    yield
    assert oracle.hook_count(model) == hooks
    assert oracle.fingerprint_changes(before, oracle.fingerprint(model), allow=REGISTERED) == []


def greedy(model: nn.Module, batch: dict[str, Tensor]) -> oracle.Generated:
    return oracle.generate_with_logits(model, batch, max_new_tokens=3)


@cells
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nothing_is_left_after_a_with_statement(family: str, modality: str, attn: str) -> None:
    model = tiny(family, attn)
    batch = inputs(model, family, modality, "padded_ragged")
    plain = greedy(model, batch)
    for name in (*hosts(family), *INSIDE_DECODER):
        with leaves_nothing(model):
            with compress(model, EVERY[name]):
                assert oracle.hook_count(model) > 0
                greedy(model, batch)
            assert torch.equal(greedy(model, batch).logits, plain.logits)


@pytest.mark.parametrize("name", ["llama", "qwen2", "clip_vision", "siglip_vision"])
def test_nothing_is_left_on_bare_models(name: str) -> None:
    model = build(name)
    decoder = name in ("llama", "qwen2")
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 2:9] = True
    methods = [DivPrune(keep=0.5), FastV(keep=0.5), PyramidDrop(keep=0.5)] if decoder else [VisionZip(), ToMe()]
    for method in methods:
        with leaves_nothing(model), torch.no_grad(), compress(model, method, visual=visual if decoder else None):
            model(torch.arange(12)[None] if decoder else torch.randn(2, 3, *2 * [model.config.image_size]))


# ---------------------------------------------------------------------------------------------------- exceptions


class Interrupted(BaseException):
    """Like KeyboardInterrupt: no Exception, so most handlers let it pass."""


@dataclass(frozen=True)
class Failing(Compressor):
    """Keeps every other token, but fails where and as it is told."""

    keep: float = 1.0
    positions: Positions = "keep"
    where: str = "llm_input"
    error: type[BaseException] = RuntimeError

    needs: ClassVar[frozenset[Need]] = frozenset({"next_attention", "tower_keys"})

    def _act(self, where: str, tokens: VisualTokens) -> VisualTokens:
        if where == self.where:
            raise self.error("the compressor failed")
        return tokens.where((tokens.source % 2 == 0) | tokens.protected)

    def vision_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        return self._act("vision_layer", tokens) if layer == 2 else tokens

    def llm_input(self, tokens: VisualTokens, ctx: Context) -> VisualTokens:
        return self._act("llm_input", tokens)

    def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
        ctx.next_attention(tokens)
        return self._act("llm_layer", tokens)

    def cut_layers(self, depth: int) -> tuple[int, ...]:
        return (2,)


ERRORS = [RuntimeError, Interrupted]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["vision_layer", "llm_input", "llm_layer"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl", "idefics3"])
def test_a_failing_compressor_leaves_nothing(family: str, where: str, error: type[BaseException]) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "left_padded")
    plain = greedy(model, batch)
    with leaves_nothing(model), pytest.raises(error), compress(model, Failing(where=where, error=error)):
        greedy(model, batch)
    again = greedy(model, batch)
    assert torch.equal(again.sequences, plain.sequences)
    assert torch.equal(again.logits, plain.logits)


def _break(module: nn.Module, error: type[BaseException]) -> Callable[[], None]:
    """Let a module fail at its next call only."""

    def fail(*_: Any) -> None:
        handle.remove()
        raise error("the model failed")

    handle = module.register_forward_hook(fail)
    return handle.remove


def _parts(model: nn.Module, family: str) -> dict[str, nn.Module]:
    base = model.base_model
    text = oracle.text_model(model)
    tower = {"qwen3_vl": "visual", "idefics3": "vision_model"}.get(family, "vision_tower")
    blocks = getattr(base, tower).blocks if family == "qwen3_vl" else getattr(base, tower).encoder.layers
    return {"tower": blocks[1], "decoder": text.layers[3], "first layer": text.layers[0].mlp, "norm": text.norm}


METHODS = {"fastv": FastV(keep=0.4), "pyramiddrop": PyramidDrop(), "tome": ToMe(), "visionzip": VisionZip(keep=4)}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("part", ["tower", "decoder", "first layer", "norm"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "idefics3"])
def test_a_failing_model_leaves_nothing(family: str, part: str, error: type[BaseException]) -> None:
    model = tiny(family)
    batch = inputs(model, family, "image", "left_padded")
    plain = greedy(model, batch)
    for method in METHODS.values():
        with leaves_nothing(model), pytest.raises(error), compress(model, method):
            _break(_parts(model, family)[part], error)
            greedy(model, batch)
        assert torch.equal(greedy(model, batch).logits, plain.logits)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("part", ["tower", "decoder", "norm"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_an_attached_session_survives_a_failure(family: str, part: str, error: type[BaseException]) -> None:
    """Within the same session the next call, and the next call without an image, know nothing of the failed one."""
    model = tiny(family)
    batch = inputs(model, family, "image", "left_padded")
    text = {name: batch[name][:, -5:] for name in ("input_ids", "attention_mask")}
    plain = greedy(model, text)
    for method in (*METHODS.values(), DivPrune(keep=0.4)):
        with compress(model, method) as session:
            want = greedy(model, batch)
            fresh = session.report
            for following in (batch, text):
                _break(_parts(model, family)[part], error)
                with pytest.raises(error):
                    greedy(model, batch)
                got = greedy(model, following)
                assert torch.equal(got.logits, (want if following is batch else plain).logits)
                assert session.report.kv_bytes == fresh.kv_bytes
            greedy(model, batch)
            assert [site.layer for site in session.report.sites] == [site.layer for site in fresh.sites]
            assert len(session.reports) == 3


# ------------------------------------------------------------------------------------------- attach and detach


def test_detaching_twice_is_fine_and_attaching_again_works() -> None:
    model = build("llava")
    with leaves_nothing(model):
        session = attach(model, FastV())
        session.detach()
        session.detach()
        with compress(model, DivPrune()) as session:
            session.detach()
        attach(model, "fastv").detach()


def test_a_second_compressor_is_refused_and_the_first_stays() -> None:
    model = build("qwen3_vl")
    batch = inputs(model, "qwen3_vl", "image", "single")
    with leaves_nothing(model), compress(model, UniformGrid(keep=4)) as session:
        hooks = oracle.hook_count(model)
        for other in (model, model.base_model):
            with pytest.raises(MMTokenError, match="already has a compressor attached"):
                attach(other, DivPrune(keep=4))
        with pytest.raises(MMTokenError, match="already"), compress(model, UniformGrid(keep=4)):
            pass
        assert oracle.hook_count(model) == hooks
        greedy(model, batch)
        assert session.report.tokens_out == [4]


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
@pytest.mark.parametrize("first", ["whole", "part"])
def test_a_part_and_its_whole_cannot_both_be_compressed(part: str, first: str) -> None:
    model = build("llava")
    inner = getattr(model.model, part)
    visual = torch.ones(1, 4, dtype=torch.bool)
    if part == "vision_tower":
        visual = None
    with (
        leaves_nothing(model),
        compress(model, DivPrune()) if first == "whole" else compress(inner, DivPrune(), visual=visual),
        pytest.raises(MMTokenError, match="already has a compressor attached"),
    ):
        attach(inner, DivPrune(), visual=visual) if first == "whole" else attach(model, DivPrune())


def test_a_failed_attach_leaves_nothing() -> None:
    model = build("llava")
    with leaves_nothing(model), pytest.raises(UnsupportedError):
        attach(model, FastV(layer=40))


def test_a_forgotten_session_stays_attached_until_it_is_detached() -> None:
    model = build("llava")
    batch = inputs(model, "llava", "image", "single")
    plain = greedy(model, batch)
    attach(model, DivPrune(keep=4))
    gc.collect()
    assert not torch.equal(greedy(model, batch).logits, plain.logits)
    with pytest.raises(MMTokenError, match=r"mmtoken\.engine\.session\.attached\(model\)"):
        attach(model, DivPrune(keep=4))
    from mmtoken.engine.session import attached

    session = attached(model)
    assert session is not None
    assert session.report.tokens_out == [4]
    session.detach()
    assert attached(model) is None
    assert torch.equal(greedy(model, batch).logits, plain.logits)


# ------------------------------------------------------------------------------------------------ several models


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "smolvlm"])
@pytest.mark.parametrize("method", INSIDE_DECODER.values(), ids=INSIDE_DECODER)
def test_models_of_one_config_object_do_not_affect_each_other(family: str, attn: str, method: Compressor) -> None:
    shared = config(family)
    shared._attn_implementation = attn
    kind = type(tiny(family))
    torch.manual_seed(0)
    one, other = kind(shared).eval(), kind(shared).eval()
    other.load_state_dict(tiny(family).state_dict())
    batch = inputs(other, family, "image", "padded_ragged")
    plain = greedy(other, batch)
    text_config = oracle.text_model(other).config
    with leaves_nothing(one), leaves_nothing(other), compress(one, method):
        before = oracle.fingerprint(other)
        greedy(one, batch)
        assert oracle.fingerprint_changes(before, oracle.fingerprint(other), allow=REGISTERED) == []
        assert oracle.text_model(other).config is text_config
        assert text_config._attn_implementation == attn
        assert torch.equal(greedy(other, batch).logits, plain.logits)
        with compress(other, DivPrune(keep=0.5)) as second:
            greedy(other, batch)
        assert second.report.compressor == "DivPrune"
        assert torch.equal(greedy(other, batch).logits, plain.logits)


# ---------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("name", ["fastv", "tome", "visionzip"])
def test_a_checkpoint_saved_while_attached_is_the_plain_model(family: str, name: str, tmp_path: Path) -> None:
    model = build(family)
    batch = inputs(model, family, "image", "left_padded")
    plain = greedy(model, batch)
    model.save_pretrained(tmp_path / "plain")
    with compress(model, EVERY[name]):
        keys = model.state_dict().keys()
        greedy(model, batch)
        model.save_pretrained(tmp_path / "attached")
    assert keys == model.state_dict().keys()
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "attached").iterdir())
    for file in files:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "attached" / file).read_bytes(), file
    loaded = type(model).from_pretrained(tmp_path / "attached").eval()
    loaded.generation_config.eos_token_id = None
    assert torch.equal(greedy(loaded, batch).logits, plain.logits)


def test_a_bare_decoder_saves_its_own_attention_setting(tmp_path: Path) -> None:
    model = build("llama").base_model
    with compress(model, FastV(), visual=torch.ones(1, 4, dtype=torch.bool)):
        model.save_pretrained(tmp_path)
    assert "mmtoken" not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config._attn_implementation == "sdpa"


COPIES: dict[str, Callable[[nn.Module], object]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda model: torch.save(model, io.BytesIO()),
    "deepcopy of the inner model": lambda model: copy.deepcopy(model.base_model),
    "deepcopy of the decoder": lambda model: copy.deepcopy(oracle.text_model(model)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("method", [FastV(), ToMe(), DivPrune()], ids=["fastv", "tome", "divprune"])
def test_copies_of_an_attached_model_are_refused(name: str, method: Compressor) -> None:
    model = build("qwen3_vl")
    with leaves_nothing(model), compress(model, method), pytest.raises(UnsupportedError, match="detach it"):
        COPIES[name](model)
    assert copy.deepcopy(model) is not None


# ------------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "method",
    [DivPrune(keep=0.4), FastV(keep=0.4), PyramidDrop(keep=0.3), VisionZip(keep=0.4), Random(keep=0.4)],
    ids=lambda method: type(method).__name__,
)
def test_threads_on_one_model_do_not_mix(method: Compressor, attn: str) -> None:
    model = tiny("llava", attn)
    batches = [inputs(model, "llava", "image", case, seed=seed) for seed, case in ((1, "ragged"), (2, "left_padded"))]
    wanted = []
    for batch in batches:
        with compress(model, method) as session:
            wanted.append((greedy(model, batch), session.report))
    start = threading.Barrier(2)
    got: dict[int, list[Any]] = {0: [], 1: []}

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            got[number].append((greedy(model, batches[number]), session.report))

    with leaves_nothing(model), compress(model, method) as session:
        threads = [threading.Thread(target=work, args=(number,)) for number in got]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(session.reports) == 8
    for number, results in got.items():
        want, report = wanted[number]
        assert len(results) == 4
        for generated, measured in results:
            assert torch.equal(generated.sequences, want.sequences)
            assert_close(generated.logits, want.logits)
            assert measured.prompt_lengths == report.prompt_lengths
            assert [k.tolist() for k in measured.kept] == [k.tolist() for k in report.kept]
            assert len(measured.sites) == len(report.sites)


def test_scores_are_read_without_switching_the_attention_of_other_threads() -> None:
    """Under eager the layer about to run is asked for its scores; a thread beside must not see another attention."""
    model = build("llava", "eager")
    seen = []

    @dataclass(frozen=True)
    class Watch(PyramidDrop):
        def llm_layer(self, tokens: VisualTokens, layer: int, ctx: Context) -> VisualTokens:
            with pytest.MonkeyPatch.context() as patch:
                from mmtoken.engine import attention

                inner = attention.tapped_copy

                def spy(*args: Any, **kwargs: Any) -> Any:
                    tapped = inner(*args, **kwargs)
                    configs = {
                        id(m.config): m.config for m in oracle.text_model(model).modules() if "config" in vars(m)
                    }
                    seen.extend(c._attn_implementation for c in configs.values())
                    return tapped

                patch.setattr(attention, "tapped_copy", spy)
                return PyramidDrop.llm_layer(self, tokens, layer, ctx)

    with compress(model, Watch(keep=0.3)):
        greedy(model, inputs(model, "llava", "image", "single"))
    assert seen
    assert set(seen) == {"eager"}


def test_a_long_run_keeps_its_last_reports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report per step would fill the memory of a training run."""
    monkeypatch.setattr(session_module, "MAX_REPORTS", 3)
    model = tiny("llava")
    batch = inputs(model, "llava", "image", "single")
    with compress(model, DivPrune(keep=4)) as session, torch.no_grad():
        filed = []
        for _ in range(5):
            model(**batch)
            filed.append(session.report)
    assert [id(report) for report in session.reports] == [id(report) for report in filed[-3:]]
    assert [report.tokens is None for report in session.reports] == [True, True, False]
