"""Steps that are made ahead are those that are made on the spot, and only who waits differs."""

import json
import threading
import time
from dataclasses import fields

import pytest
import torch

from tests.tiny_runs import metrics, tiny_recipe
from tract_fast import feed, train
from tract_fast.model import choose_attention
from tract_fast.perf import Work
from tract_fast.prepare import prepare
from tract_fast.shard import Ranks
from tract_fast.sharing import choose_sharing

CPU = torch.device("cpu")


def made(tmp_path, total=6, **changes):
    recipe = tiny_recipe(tmp_path, train__max_tokens=100, **changes)
    data = prepare(recipe, lambda text: None)
    name, _ = choose_attention(recipe.model, data.config, CPU)
    sharing = choose_sharing(recipe, data.config, name, data.train, 1)
    ranks = Ranks(device=CPU, mesh=None, rank=0, world=1)
    return feed.Feed(recipe, data.train, sharing, ranks, None, total)


def tensors(step):
    return [getattr(b, f.name) for b in step.micro_batches for f in fields(b)]


def test_ahead_is_as_on_the_spot(tmp_path):
    steps = made(tmp_path)
    ahead = [steps.take(step) for step in range(6)]
    for number, step in enumerate(ahead):
        alone = made(tmp_path).take(number)
        assert [e.id for e in step.examples] == [e.id for e in alone.examples]
        for a, b in zip(tensors(step), tensors(alone), strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert len({tuple(e.id for e in step.examples) for step in ahead}) == 6


def test_the_next_step_is_made_while_nobody_waits(tmp_path, monkeypatch):
    began, made_by = [], []
    plan = feed.plan_step

    def slow(train, examples, sharing, step, world):
        began.append(step)
        made_by.append(threading.current_thread())
        return plan(train, examples, sharing, step, world)

    steps = made(tmp_path, total=3)
    monkeypatch.setattr(feed, "plan_step", slow)
    steps.take(0)
    until = time.monotonic() + 30
    while began != [0, 1] and time.monotonic() < until:
        time.sleep(0.001)
    assert began == [0, 1], "step 1 was begun without being asked for"
    steps.take(1)
    steps.take(2)
    assert began == [0, 1, 2] and steps.ahead is None, "nothing after the last"
    assert made_by[0] is threading.main_thread() and threading.main_thread() not in made_by[1:]
    assert not any(t.daemon for t in made_by[1:]), "a daemon in native code ends a process that leaves by abort"


def test_operations_are_those_of_all_micro_batches(tmp_path):
    steps = made(tmp_path)
    steps.work = Work(trained=7, frozen=3, heads=4, windows=(None,), head=11, head_trained=True)
    step = steps.take(0)
    assert len(step.micro_batches) > 1
    lengths = [len(e.ids) for e in step.examples]
    rows = sum(len(e.ids) - e.prompt_len for e in step.examples)
    assert step.flops == steps.work.flops(lengths, lengths, rows) > 0


def test_another_step_than_the_next_can_be_taken(tmp_path):
    steps = made(tmp_path)
    steps.take(0)
    assert [e.id for e in steps.take(4).examples] == [e.id for e in made(tmp_path).take(4).examples]


def test_what_goes_wrong_is_raised_by_the_step_that_takes_it(tmp_path, monkeypatch):
    steps = made(tmp_path)
    collate = feed.collate
    calls = []

    def broken(examples, *rest, **more):
        calls.append(len(examples))
        if threading.current_thread() is not threading.main_thread():
            raise MemoryError("no room")
        return collate(examples, *rest, **more)

    monkeypatch.setattr(feed, "collate", broken)
    steps.take(0)
    with pytest.raises(MemoryError, match="no room"):
        steps.take(1)


def test_a_run_says_how_long_it_waited(tmp_path, monkeypatch):
    """A step that must wait for its data says so."""
    collate = feed.collate

    def slow(*args, **options):
        time.sleep(0.2)
        return collate(*args, **options)

    recipe = tiny_recipe(tmp_path, train__max_steps=2)
    monkeypatch.setattr(feed, "collate", slow)
    train.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line.get("step") == 1 and "loss" in line)
    assert 0.2 <= first["waited"] <= first["seconds"]
    assert len(metrics(tmp_path / "run")) == len(lines)
