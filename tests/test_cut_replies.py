"""Replies cut at the token limit: advantages by hand, and the gradient that a masked one does not give."""

import numpy as np
import pytest
import torch

from grpo_engage.studies.enumeration import tiny_trainer
from grpo_engage.text.diversity import marginal_credit, set_diversity
from grpo_engage.train.objective import Objective

REWARD = Objective(0.0, 1.0, 0.0)
GROUP = [(1, 2, 1), (1, 2, 0), (2, 0), (1, 0)]  # 0 ends a reply: the first one is cut


def prepared(cut_replies, objective=REWARD, group=GROUP, **settings):
    trainer = tiny_trainer(objective, length=3, k=len(group), loss_type="grpo", advantage_clip=100.0,
                           cut_replies=cut_replies, **settings)
    trainer.say_next([group])
    output = trainer._generate_and_score_completions([{"prompt": "yes no"}] * len(group))
    return trainer, output, np.array([trainer.tables[0][reply] for reply in group])


def by_hand(rewards):
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)


def test_a_masked_reply_is_out_of_its_groups_baseline():
    _, output, rewards = prepared("mask")
    np.testing.assert_allclose(output["advantages"].numpy(), [0.0, *by_hand(rewards[1:])], atol=1e-5)
    assert output["completion_mask"].sum(dim=1).tolist() == [0, 3, 2, 2]


def test_a_penalised_reply_has_the_lowest_reward():
    _, output, rewards = prepared("penalise")
    np.testing.assert_allclose(output["advantages"].numpy(), by_hand(np.array([min(0, rewards.min()), *rewards[1:]])),
                               atol=1e-5)
    assert output["completion_mask"].sum(dim=1).tolist() == [3, 3, 2, 2]


def test_a_kept_reply_counts_like_any_other():
    _, output, rewards = prepared("keep")
    np.testing.assert_allclose(output["advantages"].numpy(), by_hand(rewards), atol=1e-5)
    assert not np.allclose(by_hand(rewards)[1:], by_hand(rewards[1:]), atol=0.01)  # so the first test can fail


@pytest.mark.parametrize("advantage", ["leave_one_out", "max_at_k"])
def test_other_advantages_leave_it_out_too(advantage):
    k = {"max_k": 2} if advantage == "max_at_k" else {}
    _, output, _ = prepared("mask", advantage=advantage, **k)
    others = output["advantages"].numpy()
    _, alone, _ = prepared("mask", advantage=advantage, group=GROUP[1:], **k)
    expected = alone["advantages"].numpy()  # one scale for all: the root mean square over the step, of 4 and of 3
    assert others[0] == 0 and np.abs(expected).max() > 0.1
    np.testing.assert_allclose(others[1:], expected * np.sqrt(4 / 3), rtol=1e-5)


def test_diversity_is_that_of_the_finished_replies():
    _, output, _ = prepared("mask", Objective(0.0, 0.0, 1.0), diversity_metric="distinct_n")
    credit = 3 * marginal_credit(["yes no", "no", "yes"], "distinct_n")
    np.testing.assert_allclose(output["advantages"].numpy(), [0, *(credit / np.sqrt((credit**2).sum() / 4))], atol=1e-5)


def gradient(trainer, output):
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._policy_loss(trainer.model, output).backward()
    return torch.cat([p.grad.ravel() for p in trainer.model.parameters() if p.grad is not None])


def test_a_masked_reply_gives_no_gradient_and_the_others_theirs():
    trainer, output, _ = prepared("mask")
    whole = gradient(trainer, output)
    changed = output | {"advantages": output["advantages"] + torch.tensor([7.0, 0, 0, 0])}
    assert torch.equal(gradient(trainer, changed), whole) and whole.abs().max() > 0
    alone, finished, _ = prepared("mask", group=GROUP[1:])  # the mean over 3 replies instead of 4
    torch.testing.assert_close(whole * 4 / 3, gradient(alone, finished), rtol=1e-4, atol=1e-6)


def test_a_group_of_fragments_moves_nothing():
    trainer, output, _ = prepared("mask", Objective(0.0, 1.0, 0.5), group=[(1, 2, 1), (2, 2, 2), (1, 1, 1)],
                                  diversity_metric="distinct_n")
    assert output["advantages"].abs().max() == 0 and gradient(trainer, output).abs().max() == 0


@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize(("group", "finished"), [
    (GROUP, ["yes no", "no", "yes"]), ([(1, 2, 1), (2, 2, 2), (1, 0)], ["yes"]), ([(1, 2, 1), (2, 2, 2)], [])])
def test_the_logged_diversity_is_that_of_the_finished_replies_or_unknown(lam, group, finished):
    trainer, _, _ = prepared("mask", Objective(0.0, 1.0, lam), group=group, diversity_metric="distinct_n")
    expected = set_diversity(finished, "distinct_n") if len(finished) > 1 else np.nan
    assert trainer._metrics["train"]["diversity"] == [pytest.approx(expected, nan_ok=True)]
