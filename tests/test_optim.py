"""Schedules at their ends, and which parameters decay."""

import pytest
import torch

from tract_fast.optim import adamw, learning_rate
from tract_fast.recipe import Train


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedule(schedule):
    train = Train(lr=2.0, schedule=schedule, warmup=0.1)
    rates = [learning_rate(s, 50, train) for s in range(50)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5] == 2.0
    assert rates[0] > 0 and min(rates) > 0, "no step is wasted at a rate of zero"
    if schedule == "constant":
        assert set(rates[5:]) == {2.0}
    else:
        assert rates[5:] == sorted(rates[5:], reverse=True)
        assert learning_rate(50, 50, train) == pytest.approx(0.0, abs=1e-12)
        middle = learning_rate(27, 49, Train(lr=2.0, schedule=schedule, warmup=5 / 49))
        assert middle == pytest.approx(1.0)


def test_no_warm_up_and_one_step():
    assert learning_rate(0, 1, Train(lr=1.0, warmup=0.0)) == 1.0
    assert learning_rate(0, 1, Train(lr=1.0, warmup=1.0)) == 1.0


def test_groups():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = adamw(module.parameters(), Train(weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6))
    decayed, plain = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 3)] and decayed["weight_decay"] == 0.1
    assert len(plain["params"]) == 3 and plain["weight_decay"] == 0.0
    assert decayed["betas"] == (0.8, 0.9) and decayed["eps"] == 1e-6
