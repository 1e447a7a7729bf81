"""What the tests of the trainer share: the smallest policy and a few simulated posts."""

import pytest

from grpo_engage.data.simulator import simulate_pairs
from grpo_engage.policy.base_models import ensure_policy


@pytest.fixture(scope="module")
def base():
    return ensure_policy("nano")


@pytest.fixture(scope="module")
def pairs():
    return simulate_pairs(30, seed=8)[["tweet", "reply"]]
