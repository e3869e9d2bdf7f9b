"""The action codec against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtoken.errors import ActionError, InputError
from mmtoken.models.openvla import ActionCodec
from tests.backbones.openvla_checkpoint import NORM_STATS

CODEC = ActionCodec(32000, 256, NORM_STATS)
EDGES = [-1 + 2 * number / 255 for number in range(256)]
CENTRES = [(EDGES[number] + EDGES[number + 1]) / 2 for number in range(255)]
inside = st.floats(-1, 1, width=32)


def plain_token(action: float) -> int:
    """V - d, where d counts the edges that are not above the action."""
    return 32000 - sum(edge <= action for edge in EDGES)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20))
def test_tokens_count_edges(actions: list[float]) -> None:
    clear = [action for action in actions if min(abs(action - edge) for edge in EDGES) > 1e-12]
    want = [plain_token(min(max(action, -1), 1)) for action in clear]
    assert CODEC.encode(torch.tensor(clear)).tolist() == want


def test_ends_and_centres() -> None:
    assert CODEC.encode(torch.tensor([-1.0, 1.0])).tolist() == [31999, 31744]
    assert CODEC.tokens == range(31744, 32000)
    got = CODEC.decode(torch.arange(31744, 32000))
    # The last edge has no interval behind it: its token and the one before stand for the last centre.
    want = [CENTRES[254], *reversed(CENTRES)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=50)
@given(st.lists(inside, min_size=1, max_size=20))
def test_an_action_comes_back_within_half_a_bin(actions: list[float]) -> None:
    given_ = torch.tensor(actions)
    assert (CODEC.decode(CODEC.encode(given_)) - given_).abs().max() <= 1 / 255 + 1e-6


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(inside, inside, inside), min_size=1, max_size=5))
def test_the_scale_of_a_data_set(actions: list[tuple[float, float, float]]) -> None:
    action = NORM_STATS["toy_arm"]["action"]
    want = [
        [
            0.5 * (value + 1) * (high - low) + low if masked else value
            for value, low, high, masked in zip(row, action["q01"], action["q99"], action["mask"], strict=True)
        ]
        for row in actions
    ]
    got = CODEC.unnormalise(torch.tensor(actions), "toy_arm")
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(CODEC.normalise(got, "toy_arm"), torch.tensor(actions), atol=1e-5, rtol=1e-4)
    all_scaled = CODEC.unnormalise(torch.tensor(actions), "other_arm")  # without a mask
    torch.testing.assert_close(
        all_scaled, 0.5 * (torch.tensor(actions) + 1) * torch.tensor([1.0, 2.0, 3.0]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("token", [31743, 32000, 2, -1])
def test_other_tokens_are_no_actions(token: int) -> None:
    with pytest.raises(ActionError, match=rf"token {token} at \[1, 1\] is no action") as error:
        CODEC.decode(torch.tensor([[31900, 31901], [31900, token], [token, token]]))
    assert error.value.rows == (1, 2)


def test_what_cannot_be_encoded_or_scaled() -> None:
    with pytest.raises(InputError, match="NaN"):
        CODEC.encode(torch.tensor([0.0, math.nan]))
    with pytest.raises(InputError, match=r"shape \(1, 4\) but .* 3 dimensions"):
        CODEC.unnormalise(torch.zeros(1, 4), "toy_arm")
    with pytest.raises(InputError, match="norm_stats is empty"):
        ActionCodec(32000).length()
    with pytest.raises(InputError, match="different lengths"):
        ActionCodec(32000, 256, {"a": {"action": {"q01": [0.0], "q99": [1.0, 2.0]}}}).length()
    with pytest.raises(InputError, match="no 'action' with 'q01' and 'q99'"):
        ActionCodec(32000, 256, {"a": {"proprio": {}}}).length()
    assert ActionCodec(32000, 256, {"only": NORM_STATS["toy_arm"]}).length() == 3
