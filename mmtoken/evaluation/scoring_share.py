"""What the scoring of TransPrune, STC-Pruner and Zero-TPrune costs beside the prefill of a 7B-shaped decoder, on a CPU.

`python -m mmtoken.evaluation.scoring_share --out benchmarks/kernels_share.json`. A prefill is the operations of its
matrix products divided by the rate that one measured product reaches: a lower bound of what it takes, so that shares
are upper bounds. Operations that stay below one per cent need no kernel of their own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmtoken.compressors.stcpruner import History, score_chunk
from mmtoken.compressors.transprune import TransPrune, transition_value
from mmtoken.compressors.zerotprune import ZeroTPrune
from mmtoken.engine.listening import transition
from mmtoken.errors import MMTokenError
from mmtoken.evaluation.timing import MIN_ROUNDS, Stopwatch, Summary, environment, interleave, one_thread
from mmtoken.kernels.pagerank import pagerank
from mmtoken.wholefile import check_target, whole_file

TOKENS = 2880
LAYERS, HIDDEN, INTERMEDIATE = 32, 4096, 11008
BLOCKS, TOWER_HEADS, HEAD_WIDTH = 23, 16, 64
"""Of CLIP ViT-L, read after its last block but one."""
FRAMES = 16
EDGE = 2048
"""Of the square matrices of the product whose rate is measured."""


def prefill_operations(tokens: int) -> int:
    """Multiply-adds, counted as two, of the matrix products of a prefill; attention without the causal half."""
    return LAYERS * (2 * tokens * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE) + 4 * tokens**2 * HIDDEN)


def rounds_of_pagerank(tokens: int) -> dict[int, int]:
    """Most rounds after the cheap first one per number of tokens, where Zero-TPrune's defaults cut."""
    method = ZeroTPrune()
    cuts = method.cuts(BLOCKS)
    counts = [tokens, *(method.target(tokens, stage, len(cuts)) for stage in range(len(cuts) - 1))]
    return {count: method._rounds(cut, BLOCKS) for count, cut in zip(counts, cuts, strict=True)}


def pieces(tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    left, right = random(EDGE, EDGE), random(EDGE, EDGE)
    before, after = random(1, tokens, HIDDEN), random(1, tokens, HIDDEN)
    everything = torch.ones(1, tokens, dtype=torch.bool)
    frames = list(random(FRAMES, tokens // FRAMES, HIDDEN))
    query, key = random(2, 1, TOWER_HEADS, tokens, HEAD_WIDTH)

    def module() -> None:
        magnitude, cosine = transition(before, after)
        transition_value(magnitude, cosine, everything, absolute=True)

    def cut(count: int, rounds: int) -> None:
        start = torch.full((1, count), 1 / count)
        for number in (1, rounds):
            pagerank(query[:, :, :count], key[:, :, :count], everything[:, :count], start, number)

    return {
        "product": lambda: left @ right,
        "transition of a module": module,
        "anchor scores": lambda: score_chunk(frames, History()),
        **{
            f"page rank of {count}": partial(cut, count, rounds) for count, rounds in rounds_of_pagerank(tokens).items()
        },
    }


def measure(tokens: int, rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Timings, shares and where they are from, ready for JSON."""

    def variant(piece: Callable[[], Any]) -> Callable[[Stopwatch], None]:
        def run(watch: Stopwatch) -> None:
            with watch.stage("run"):
                piece()

        return run

    device = torch.device("cpu")
    with torch.no_grad(), one_thread(device):
        variants = {name: variant(piece) for name, piece in pieces(tokens).items()}
        timings = interleave(variants, rounds, progress=progress)
    seconds = {name: stages["run"] for name, stages in timings.items()}
    prefill = [prefill_operations(tokens) * spent / (2 * EDGE**3) for spent in seconds["product"]]
    modules = 2 * len(TransPrune().watched_layers(LAYERS))
    ranks = rounds_of_pagerank(tokens)
    totals = {
        "transition_score": [modules * spent for spent in seconds["transition of a module"]],
        "anchor_score": seconds["anchor scores"],
        "pagerank": [sum(cuts) for cuts in zip(*(seconds[f"page rank of {count}"] for count in ranks), strict=True)],
    }
    return {
        "schema_version": 1,
        "kind": "scoring share",
        "environment": environment(device),
        "dtype": "float32",
        "tokens": tokens,
        "decoder": {"layers": LAYERS, "hidden": HIDDEN, "intermediate": INTERMEDIATE},
        "prefill": "operations of the matrix products / rate of one measured product: a lower bound",
        "prefill_s": Summary.of(prefill).to_dict(),
        "product_gflops": Summary.of([2 * EDGE**3 / spent for spent in seconds["product"]]).to_dict(1e-9),
        "counted": {
            "transition_score": f"{modules} modules, those that the defaults watch in {LAYERS} layers",
            "anchor_score": f"one video of {FRAMES} frames, once",
            "pagerank": f"1 and {ranks} rounds by tokens, at the cuts of a tower of {BLOCKS} blocks; none ends early",
        },
        "seconds": {name: Summary.of(values).to_dict() for name, values in totals.items()},
        "share_of_prefill": {
            name: Summary.of([a / b for a, b in zip(values, prefill, strict=True)]).to_dict(digits=6)
            for name, values in totals.items()
        },
        "rounds": rounds,
    }


def main(argv: Sequence[str]) -> int:
    """Measure and write the JSON; 0 on success.

    Raises:
        MMTokenError: an argument cannot be used.
    """
    parser = argparse.ArgumentParser("python -m mmtoken.evaluation.scoring_share", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("kernels_share.json"), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="default: %(default)s")
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.tokens < FRAMES:
        raise MMTokenError(
            f"rounds={options.rounds}, tokens={options.tokens}; give at least 1 round and {FRAMES} tokens."
        )
    target = check_target(options.out, "out", ".json")
    results = measure(
        options.tokens,
        options.rounds,
        lambda line: print(line, file=sys.stderr, flush=True),  # noqa: T201
    )
    with whole_file(target) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    shares = ", ".join(f"{name} {share['median']:.2%}" for name, share in results["share_of_prefill"].items())
    sys.stdout.write(f"of a prefill of {options.tokens} tokens: {shares}\nwrote {target}\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MMTokenError as error:
        sys.exit(f"error: {error}")
