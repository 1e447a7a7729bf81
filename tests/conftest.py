"""What the tests of the trainer share: the smallest policy and a few simulated posts."""

import pytest

from grpo_engage.base_models import ensure_policy
from grpo_engage.simulator import simulate_pairs


@pytest.fixture(scope="module")
def base():
    return ensure_policy("nano")


@pytest.fixture(scope="module")
def pairs():
    return simulate_pairs(30, seed=8)[["tweet", "reply"]]
