"""Going on from a checkpoint with other settings: which may change, and that they leave the result as it is."""

import pytest
import torch

from tests.tiny_runs import metrics, tiny_recipe
from tract_fast import checkpoint, resume, train
from tract_fast.errors import UserError

CHANGES = {
    "recomputed": {"train__activation_checkpointing": "full"},
    "smaller micro-batches": {"train__max_tokens": 130},
    "reference": {"loss__implementation": "reference"},
    "sdpa": {"model__attention": "sdpa"},
    "liger": {"model__liger": "off"},
    "lean": {"model__lean": "off"},
    "tracker": {"train__trackers": ("tensorboard",)},
    "compiled": {"train__compile": True},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.soak) if n == "compiled" else n for n in CHANGES])
def test_the_same_result_with_another_setting(tmp_path, capsys, name):
    """Three steps one way and three the other are six of one kind, to rounding; what changed is told."""
    constant = {"train__schedule": "constant", "train__warmup": 0.0}
    assert train.run(tiny_recipe(tmp_path, "whole", **constant)) == 0
    assert train.run(tiny_recipe(tmp_path, "half", **constant, train__max_steps=3)) == 0
    capsys.readouterr()
    changed = tiny_recipe(tmp_path, "half", **constant, **CHANGES[name])
    assert train.run(changed) == 0
    setting = next(iter(CHANGES[name])).replace("__", ".")
    assert f"resume: {setting} was " in capsys.readouterr().out
    whole, half = (checkpoint.trained_weights(checkpoint.latest(tmp_path / run)) for run in ("whole", "half"))
    for key, value in whole.items():
        torch.testing.assert_close(half[key], value, rtol=1e-4, atol=2e-5, msg=key)
    ours, theirs = ([x for x in metrics(tmp_path / run) if "loss" in x] for run in ("half", "whole"))
    assert ours == [pytest.approx(line, rel=1e-3, abs=1e-6) for line in theirs]


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        ({"loss__gradient": "sampled"}, {"train__max_tokens": 300}, "a sampled gradient is drawn by micro-batch"),
        ({"lora__rank": 4, "lora__dropout": 0.1}, {"train__max_tokens": 300}, "dropout is drawn by micro-batch"),
        ({"lora__rank": 4, "lora__dropout": 0.1}, {"train__compile": True}, "compiled dropout draws other numbers"),
        ({}, {"model__attention": "flash_attention_2"}, "the order of the data"),
        ({"model__attention": "flash_attention_3"}, {"model__attention": "sdpa"}, "the order of the data"),
        ({}, {"data__share_prompts": "off"}, "was auto, is off"),
        ({}, {"train__seed": 1}, "was 42, is 1"),
    ],
)
def test_another_result_is_refused(tmp_path, before, now, why):
    old, new = tiny_recipe(tmp_path, **before), tiny_recipe(tmp_path, **{**before, **now})
    (told,) = resume.refused(old, new)
    assert why in told and not resume.announced(old, new)


def test_where_a_run_goes_is_free(tmp_path):
    old = tiny_recipe(tmp_path)
    new = tiny_recipe(tmp_path, "elsewhere", train__max_steps=9, checkpoint__every=3, shard__cpu_offload=True)
    assert resume.refused(old, new) == resume.announced(old, new) == []


def test_a_change_is_told_together_with_what_is_refused(tmp_path):
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    with pytest.raises(UserError, match=r"of another recipe \(train.lr was 0.001, is 0.5\): choose another run.dir"):
        train.run(tiny_recipe(tmp_path, train__lr=0.5, train__max_tokens=300))
