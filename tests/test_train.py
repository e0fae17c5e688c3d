"""Whole runs on tiny models: gradients do not depend on packing, resuming is exact, faults stop before harm."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import Starcoder2Config

from tests.tiny import tiny_tokenizer
from tests.tiny_models import SIZE, random_lm
from tests.tiny_runs import metrics, tiny_recipe, write_data
from tract_fast import checkpoint, lean, model, recipe as recipes, shard, train
from tract_fast.attention import hidden_states
from tract_fast.errors import RunStopped, UserError
from tract_fast.prepare import prepare
from tract_fast.selfcheck import bare_batch
from tract_fast.shards import Stored


def gradients(recipe, step=0, draw=0):
    """Gradients of one optimizer step, before clipping, by parameter name; ``draw``: another has other dropout."""
    with shard.start_ranks() as ranks:
        job = train.assemble(recipe, ranks, prepare(recipe, lambda text: None), lambda text: None)
        taken = job.feed.take(step)
        train.seed_step(recipe.train.seed, step, draw)
        loss = 0.0
        for batch in taken.micro_batches:
            out = job.model(batch)
            out.loss.backward()
            loss += out.loss.item()
        found = {n: p.grad.full_tensor().clone() for n, p in job.model.trainable().items()}
        return loss, found, len(taken.micro_batches), taken.examples, job


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_packing_does_not_change_the_gradient(tmp_path, family, reduction):
    """A batch of 8 in one micro-batch, in several, and in 8."""
    settings = {"family": family, "train__batch": 8, "loss__ce_reduction": reduction}
    lengths = sorted(len(e.ids) for e in prepare(tiny_recipe(tmp_path, **settings), lambda text: None).train)
    results = [gradients(tiny_recipe(tmp_path, train__max_tokens=m, **settings)) for m in (4096, 300, lengths[-1])]
    assert results[0][2] == 1 and results[1][2] in (2, 3, 4, 5) and results[2][2] >= 5
    for loss, found, *_ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, grad in found.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    "change", [{"lora__rank": 4, "lora__dropout": 0.2}, {"family": "starcoder2"}], ids=["lora", "own"]
)
@pytest.mark.parametrize("setting", ["full", "selective"])
def test_dropout_is_recomputed_as_it_was(tmp_path, setting, change):
    """That of adapters and a model's own: backward must see the masks of forward."""
    folder = tmp_path / "starcoder2"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    config = Starcoder2Config(vocab_size=len(tokenizer) + 3, residual_dropout=0.2, sliding_window=None, **SIZE)
    random_lm(config).save_pretrained(folder)

    def drawn(draw, setting):
        return gradients(tiny_recipe(tmp_path, train__activation_checkpointing=setting, **change), draw=draw)[:2]

    kept, other, again = drawn(1, "none"), drawn(2, "none"), drawn(1, setting)
    assert kept[0] == again[0]
    assert any(not torch.allclose(other[1][name], grad) for name, grad in kept[1].items()), "another draw, other masks"
    for name, grad in kept[1].items():
        torch.testing.assert_close(again[1][name], grad, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_equals_plain_autograd(tmp_path, lora_rank):
    """Against an unpacked, unsharded computation that knows nothing of batches: example by example, full logits."""
    recipe = tiny_recipe(
        tmp_path, lora__rank=lora_rank, loss__regression_weight=0.7, loss__ce_weight=0.9, loss__normalize="vocab"
    )
    loss, found, _, examples, _ = gradients(recipe)
    data = prepare(recipe, lambda text: None)
    built = model.build(recipe, data.config, data.tokenizer, data.scale, torch.device("cpu"), lambda text: None)
    built.train()
    values = torch.tensor(data.scale.values)
    n_tokens = sum(len(e.ids) - e.prompt_len for e in examples)
    total = 0.0
    for e in examples:
        ids = torch.tensor(e.ids)
        hidden = hidden_states(built.backbone, bare_batch([ids]))
        logp = torch.log_softmax(hidden @ built.head.weight.T, dim=-1)
        ce = -sum(logp[t - 1, ids[t]] for t in range(e.prompt_len, len(ids)))
        expected = (logp[len(ids) - 3, list(data.scale.token_ids)].exp() * values).sum()
        total = total + 0.9 * ce / n_tokens + 0.7 * (expected - e.score) ** 2 / len(examples)
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    assert found
    for name, p in built.trainable().items():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_one_rank_has_one_buffer_for_the_gradients_of_a_unit(tmp_path, monkeypatch):
    """What goes into FSDP2's reduction is what comes out of it, and of the first micro-batch what gradients are in."""
    given, allocate = [], shard.OfOneRank.allocate
    monkeypatch.setattr(
        shard.OfOneRank, "allocate", lambda *args, **kwargs: given.append(allocate(*args, **kwargs)) or given[-1]
    )
    _, _, count, _, job = gradients(tiny_recipe(tmp_path, train__batch=8, train__max_tokens=300))
    pairs = list(zip(given[::2], given[1::2], strict=True))
    assert count > 1 and len(pairs) % count == 0
    assert all(one is two for one, two in pairs)
    first = {one.untyped_storage().data_ptr() for one, _ in pairs[: len(pairs) // count]}
    assert {p.grad.to_local().untyped_storage().data_ptr() for p in job.model.trainable().values()} == first


def test_a_buffer_whose_reduction_failed_is_not_given_again():
    comm, about = shard.OfOneRank(), {"dtype": torch.float32, "device": torch.device("cpu")}
    first = comm.allocate((5,), **about)
    del first  # as where an error lets it go before the second call
    second = comm.allocate((6,), **about)
    assert len(second) == 6 and comm.allocate((6,), **about) is second
    with pytest.raises(AssertionError, match="nothing to reduce"):
        comm(second, second, None, None)


def weights(run_dir, step):
    stored = Stored((checkpoint.folder(Path(run_dir)) / f"step_{step:06d}").glob("*.safetensors"))
    return {name: stored.whole(name) for name in stored.shapes}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora__rank": 4, "lora__dropout": 0.2, "model__dtype": "bfloat16"},
        {"train__activation_checkpointing": "full", "lora__rank": 4, "lora__dropout": 0.2},
        {"lora__rank": 4, "model__dtype": "bfloat16", "train__max_tokens": 150, "siblings": 3},
    ],
    ids=["full", "lora-dropout-bf16", "recompute-dropout", "siblings"],
)
def test_resume_is_bitwise(tmp_path, settings):
    """6 steps = 3 + resume + 3 bit for bit, data order, dropout and optimizer included, over an epoch boundary."""
    settings = dict(settings)
    write_data(tmp_path / "data.jsonl", siblings=settings.pop("siblings", 1))
    assert train.run(tiny_recipe(tmp_path, "whole", **settings)) == 0
    half = tiny_recipe(tmp_path, "half", **settings)
    stop_after(half, 3)
    assert checkpoint.latest(tmp_path / "half").name == "step_000003"
    assert train.run(half) == 0
    whole, halves = weights(tmp_path / "whole", 6), weights(tmp_path / "half", 6)
    assert set(whole) == set(halves)
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "half")


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_a_checkpoint_after_an_evaluation_is_exact(tmp_path, family):
    """An evaluation leaves the head gathered in bfloat16; what is saved must be the float32 masters and their state."""
    settings = {"model__dtype": "bfloat16", "train__schedule": "constant", "train__warmup": 0.0, "train__eval_every": 3}
    assert train.run(tiny_recipe(tmp_path, "whole", family, **settings)) == 0
    assert train.run(tiny_recipe(tmp_path, "half", family, train__max_steps=3, **settings)) == 0
    assert {w.dtype for w in weights(tmp_path / "half", 3).values()} == {torch.float32}
    assert train.run(tiny_recipe(tmp_path, "half", family, **settings)) == 0
    whole, halves = weights(tmp_path / "whole", 6), weights(tmp_path / "half", 6)
    assert all(torch.equal(value, halves[name]) for name, value in whole.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "half")


@pytest.mark.parametrize("step", [2, 6])
def test_a_stop_does_not_lose_an_evaluation(tmp_path, step):
    """A stop in a step that an evaluation follows, also the last one, leaves it to the next start."""
    recipe = tiny_recipe(tmp_path, train__eval_every=2)
    stop_after(recipe, step)
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval" in line] == list(range(0, step, 2))
    assert train.run(recipe) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "eval" in line] == [0, 2, 4, 6]
    before = metrics(tmp_path / "run")
    assert train.run(recipe) == 0
    assert metrics(tmp_path / "run") == before, "nothing to do"


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_stop_in_an_evaluation_abandons_it(tmp_path, monkeypatch, step):
    """Before the first step, in the midst, after the last: the state is saved, and the next start evaluates."""
    settings = {"train__eval_every": 3, "train__max_tokens": 70}  # several micro-batches of held-out examples
    assert train.run(tiny_recipe(tmp_path, "whole", **settings)) == 0
    recipe, forward, seen = tiny_recipe(tmp_path, **settings), model.TractModel.forward, []

    def forward_then_signal(self, batch):
        if not torch.is_grad_enabled():
            seen.append(len(metrics(tmp_path / "run")))
            if seen.count(seen[-1]) == 2 and sum("loss" in x for x in metrics(tmp_path / "run")) == step:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(model.TractModel, "forward", forward_then_signal)
        assert train.run(recipe) == 75
    assert seen.count(seen[-1]) == 2 and not any(x["step"] == step and "eval" in x for x in metrics(tmp_path / "run"))
    found = checkpoint.latest(tmp_path / "run")
    assert found is None if step == 0 else found.name == f"step_{step:06d}"
    assert train.run(recipe) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_signal_within_a_step_ends_after_it(tmp_path, monkeypatch):
    """One rank has no other to agree with before it leaves."""
    recipe, forward = tiny_recipe(tmp_path), model.TractModel.forward

    def forward_then_signal(self, batch):
        if torch.is_grad_enabled() and len(metrics(tmp_path / "run")) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, batch)

    monkeypatch.setattr(model.TractModel, "forward", forward_then_signal)
    assert train.run(recipe) == 75
    assert [line["step"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert checkpoint.latest(tmp_path / "run").name == "step_000002"


def stop_after(recipe, step):
    """Run until ``step`` steps are done, then as a SIGTERM would end it."""
    taken = train.train_step

    def step_then_signal(job, i, stop, **options):
        if i + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return taken(job, i, stop, **options)

    train.train_step = step_then_signal
    try:
        assert train.run(recipe) == 75
    finally:
        train.train_step = taken


def test_metrics_lines(tmp_path):
    recipe = tiny_recipe(tmp_path, train__eval_every=2)
    train.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    names = ["step", "loss", "ce", "mse", "score_mass", "score_mae", "lr", "grad_norm"]
    names += ["tokens", "logical_tokens", "rows", "samples", "seconds", "waited", "tflops", "memory"]
    assert all(list(line) == names for line in steps)
    held_out = [line for line in lines if "eval" in line]
    assert [line["step"] for line in held_out] == [0, 2, 4, 6]
    assert set(held_out[0]["eval"]) == {"pearson", "spearman", "kendall", "rmse", "mae", "ce", "score_mass", "n"}
    assert held_out[-1]["eval"]["ce"] < held_out[0]["eval"]["ce"], "a model that trains gets better at its own format"


def test_resolved_recipe_runs_again(tmp_path):
    recipe = tiny_recipe(tmp_path, train__max_steps=2)
    train.run(recipe)
    again = recipes.load(tmp_path / "run" / "recipe.yaml", ["--run.dir", str(tmp_path / "again")])
    train.run(again)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "again")


def test_loss_that_is_not_finite_stops_before_the_update(tmp_path):
    recipe = tiny_recipe(tmp_path, train__lr=1e30, train__clip=None, checkpoint__every=1)
    with pytest.raises(RunStopped, match=r"is (nan|inf) at step \d, before the update; its examples: data.jsonl:\d+"):
        train.run(recipe)
    kept = weights(tmp_path / "run", int(checkpoint.latest(tmp_path / "run").name[-6:]))
    lines = metrics(tmp_path / "run")
    assert kept and lines[-1]["step"] == int(checkpoint.latest(tmp_path / "run").name[-6:])


def test_resume_refuses_another_recipe(tmp_path):
    recipe = tiny_recipe(tmp_path, train__max_steps=2)
    train.run(recipe)
    with pytest.raises(UserError, match=r"train.lr was 0.001, is 0.5.*choose another run.dir"):
        train.run(tiny_recipe(tmp_path, train__max_steps=2, train__lr=0.5))
    with pytest.raises(UserError, match=r"train.max_steps = 1: .* has 2 steps; write 2 or more"):
        train.run(tiny_recipe(tmp_path, train__max_steps=1))
    with pytest.raises(UserError, match=r"run.resume = never"):
        train.run(tiny_recipe(tmp_path, train__max_steps=2, run__resume="never"))
    assert train.run(tiny_recipe(tmp_path, train__max_steps=3)) == 0, "max_steps may grow"
    data = tmp_path / "data.jsonl"
    data.write_text("".join(reversed(data.read_text().splitlines(keepends=True))))
    with pytest.raises(UserError, match=r"is not what .*step_000003 was trained on"):
        train.run(tiny_recipe(tmp_path, train__max_steps=4))


@pytest.mark.parametrize("setting", ["full", "2", "selective"])
def test_activation_checkpointing_is_exact(tmp_path, monkeypatch, setting):
    calls = []
    product = lean.gated_product
    monkeypatch.setattr(lean, "gated_product", lambda *args: calls.append(1) or product(*args))
    _, plain, *_ = gradients(tiny_recipe(tmp_path, lora__rank=4))
    once = len(calls)
    calls.clear()
    _, found, *_ = gradients(tiny_recipe(tmp_path, lora__rank=4, train__activation_checkpointing=setting))
    assert len(calls) > once, "nothing was computed again"
    for name, grad in plain.items():
        assert torch.equal(grad, found[name]), name


def test_ctrl_c_saves_and_goes_on(tmp_path):
    """A real process, interrupted in the middle, leaves a whole checkpoint, says how to go on, and does."""
    recipe = tiny_recipe(tmp_path, train__max_steps=2000, checkpoint__every=1000)
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    command = [sys.executable, "-m", "tract_fast", "train", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 4):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "the same command goes on from here" in printed and "Traceback" not in printed
    done = int(checkpoint.latest(tmp_path / "run").name[-6:])
    assert metrics(tmp_path / "run")[-1]["step"] == done
    assert train.run(tiny_recipe(tmp_path, train__max_steps=done + 1, checkpoint__every=1000)) == 0
    assert metrics(tmp_path / "run")[-2]["step"] == done + 1


def test_tensorboard(tmp_path):
    """What the tracker's files hold is what ``metrics.jsonl`` holds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.run(tiny_recipe(tmp_path, train__max_steps=2, train__trackers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = [line for line in metrics(tmp_path / "run") if "eval" not in line]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (line["step"], pytest.approx(line["loss"], rel=1e-5)) for line in steps
    ]
    assert [e.step for e in events.Scalars("eval/rmse")] == [0, 2]


def test_two_ranks_train_as_one(tmp_path):
    """The same run on two gloo processes: 6 steps, an uneven batch, a tied head, evaluations, a sharded checkpoint, and
    prompts with three rationales, of which each rank has some."""
    write_data(tmp_path / "data.jsonl", siblings=3)
    train.run(tiny_recipe(tmp_path, "one", family="llama_tied", train__batch=5))
    (tmp_path / "two.yaml").write_text(recipes.dump(tiny_recipe(tmp_path, "two", "llama_tied", train__batch=5)))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tract_fast", "train"]
    done = subprocess.run([sys.executable, *command, str(tmp_path / "two.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        # what two ranks both need, both compute
        assert one.pop("tokens", 0) <= two.pop("tokens", 0) <= two.get("logical_tokens", 0)
        assert one.get("eval", one) == pytest.approx(two.get("eval", two), rel=1e-4)
    stored = checkpoint.trained_weights(checkpoint.latest(tmp_path / "two"))
    for name, value in checkpoint.trained_weights(checkpoint.latest(tmp_path / "one")).items():
        torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-5, msg=name)
