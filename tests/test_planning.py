"""The command plan: what it prints, what fits, times from stated rates, and GPUs by name."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from transformers import LlamaConfig

from tests.tiny import tiny_tokenizer
from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import estimate, fitting, forecast, gpus, memory, perf, planning, recipe as recipes, trace
from tract_fast.cli import main
from tract_fast.errors import UserError
from tract_fast.estimate import Target
from tract_fast.prepare import prepare

H100 = gpus.called("h100-80gb")
WIDTHS = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def large(folder, **changes):
    """A recipe of 8 of Llama-3-8B's 32 blocks: there is a configuration and a tokenizer, and no weights."""
    path = folder / "large"
    config = LlamaConfig(vocab_size=128_256, num_hidden_layers=8, tie_word_embeddings=False, **WIDTHS)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    write_data(folder / "data.jsonl", n=256)
    settings = {"model__dtype": "bfloat16", "data__holdout": 0.0, "train__batch": 256, "train__max_tokens": 16384}
    settings |= {"model__lean": "off"}  # blocks keep what makes micro-batches not fit
    return tiny_recipe(folder, family="large", **settings | changes)


def planned(recipe, world=1, gpu=H100, mfu=0.4):
    target = Target(device=torch.device("cuda"), world=world, gpu=gpu, here=False)
    return planning.plan_of(recipe, prepare(recipe, lambda text: None, target.device), target, mfu)


def printed(capsys, tmp_path, recipe, *argv):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipes.dump(recipe))
    assert main(["plan", str(path), *argv]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    return large(tmp_path_factory.mktemp("large"))


def test_what_is_printed(capsys, tmp_path, big):
    text = printed(capsys, tmp_path, big, "--gpus", "8", "--gpu", "h100-80gb", "--lora.rank", "8")
    assert "8 x h100-80gb; attention tract_varlen, loss chunked" in text
    assert "2,800.8M weights, 5.24M of them trained" in text
    for line in ("AdamW state (float32)", "gradients", "activations (train.activation_checkpointing none)", "the loss"):
        assert line in text
    assert "memory of one rank at its peak: in the " in text and "GiB: none " in text and ", full " in text
    assert "largest micro-batch that fits: train.max_tokens " in text and "of 79.1 GiB: fits" in text
    for stage in ("stage 1, 6 steps", "generation, 256 rationales", "stage 2, 6 steps", "in all", "GPU-hours"):
        assert stage in text
    assert "assumed, not measured: 40% of 989 TFLOP/s" in text and "not counted: loading" in text
    assert not (tmp_path / "run").exists(), "nothing is written"


def test_what_does_not_fit_is_told_with_what_would_help(capsys, tmp_path, big):
    text = printed(capsys, tmp_path, big, "--gpu", "l4-24gb")
    assert "of 22.0 GiB: DOES NOT FIT" in text and "not even the longest example fits by itself" in text
    advice = [
        "what would help, in this order: ",
        "2 ranks (run.nproc, or more nodes) (about",
        "shard.cpu_offload true (",
    ]
    places = [text.index(s) for s in (*advice, "lora.rank 8 (adapters instead of all weights) (about")]
    assert places == sorted(places) and "GiB less, still " in text and " GiB too much)" in text


def test_advice_after_memory_ran_out_traces_little(big, monkeypatch):
    """Whether each remedy fits is told, and a train.max_tokens above the longest example's, without a search."""
    recipe = replace(big, lora=replace(big.lora, rank=8))
    target = Target(device=torch.device("cuda"), world=1, gpu=gpus.called("l4-24gb"), here=False)
    data = prepare(recipe, lambda text: None, target.device)
    traces = []
    peak = trace.peak
    monkeypatch.setattr(trace, "peak", lambda *args, **options: traces.append(args) or peak(*args, **options))
    told = memory.remedies(recipe, data, target)
    tokens, rest = re.search(r"train.max_tokens (\d+) \(([^)]*)\)", told).groups()
    assert fitting.longest_of(data) < int(tokens) < recipe.train.max_tokens and rest.endswith("GiB less, fits")
    assert told.count(", fits)") + told.count("GiB too much") == told.count("GiB less")
    assert len(traces) <= 2 * 9, "at most two micro-batches for each of what is tried"


def test_few_micro_batches_stand_for_all(big):
    """Every size is within 1% of its largest in one of those that are traced."""
    step = planned(replace(big, train=replace(big.train, max_tokens=700, batch=64))).step
    every = [m for ranks in step.packed for rank in ranks for m in rank]
    for masked in (False, True):
        found = step.largest(masked=masked)
        sizes = [lambda m: m.layout.tokens, lambda m: m.rows, *([lambda m: m.pairs()] if masked else [])]
        assert all(max(map(size, found)) >= 0.99 * max(map(size, every)) for size in sizes)
        assert len(found) <= (3 if masked else 2) < len(every)


def test_what_fits_of_what_does_not(capsys, tmp_path, big):
    """With LoRA it is the activations that are too many."""
    text = printed(capsys, tmp_path, big, "--gpu", "l4-24gb", "--lora.rank", "8")
    assert "DOES NOT FIT" in text and "in this order: train.activation_checkpointing full (about" in text
    (offered,) = re.findall(r"train.max_tokens (\d+) \(about \d+\.\d\d of \d+\.\d\d GiB less, fits\)", text)
    (most,) = re.findall(r"largest micro-batch that fits: train.max_tokens (\d+)$", text, re.MULTILINE)
    assert offered == most, "the same is advised"
    more = str(int(most) + fitting.MULTIPLE)
    for tokens, told in ((most, "GiB: fits"), (more, "GiB: DOES NOT FIT")):
        assert told in printed(
            capsys, tmp_path, big, "--gpu", "l4-24gb", "--lora.rank", "8", "--train.max_tokens", tokens
        )


def test_without_a_gpu(capsys, tmp_path):
    text = printed(capsys, tmp_path, tiny_recipe(tmp_path))
    assert "a CPU with 1 rank: no GPU is here; name one with --gpu" in text
    assert "not compared with a GPU" in text and "the process (CPU)" in text
    assert "no times: no rates are stated for this machine" in text and "hours" not in text


def test_float32_has_its_own_rate(capsys, tmp_path):
    recipe = tiny_recipe(tmp_path)
    text = printed(capsys, tmp_path, recipe, "--gpu", "h100-80gb")
    assert "40% of 67 TFLOP/s (float32 without tensor cores; --mfu)" in text
    text = printed(capsys, tmp_path, recipe, "--gpu", "h100-80gb", "--run.peak_tflops", "60")
    assert "40% of 60 TFLOP/s (run.peak_tflops; --mfu)" in text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.178, "0.18 s"), (4.26, "4.3 s"), (89, "89 s"), (91, "1.5 min"), (5399, "90 min"), (5401, "1.5 h")]
    + [(200_000, "56 h"), (2e7, "5,556 h"), (0, "0 s")],
)
def test_durations_have_the_unit_that_suits(seconds, told):
    assert planning.duration(seconds) == told


def test_times_are_told_in_their_units(capsys, tmp_path):
    text = printed(capsys, tmp_path, tiny_recipe(tmp_path, model__dtype="bfloat16"), "--gpu", "h100-80gb")
    assert re.search(r"^ +\d\S* s  stage 1, 6 steps$", text, re.MULTILINE) and " h  " not in text


def test_offloaded_weights_are_told_of_the_host(capsys, tmp_path, big):
    """Weights, gradients and AdamW's two averages in float32, a rank's share of each."""
    options = ("--gpus", "4", "--gpu", "h100-80gb")
    text = printed(capsys, tmp_path, big, *options, "--shard.cpu_offload", "true")
    a_rank, node = map(float, re.search(r"offload\): (\S+) GiB a rank, (\S+) GiB for 4 on a node", text).groups())
    assert a_rank == pytest.approx(16 * planned(big).sizes.weights / 4 / gpus.GIB, rel=0.01)
    assert node == pytest.approx(4 * a_rank, abs=0.03)
    assert "host memory" not in printed(capsys, tmp_path, big, *options)


def test_one_stage(capsys, tmp_path):
    recipe = tiny_recipe(tmp_path, model__dtype="bfloat16", stage2__train=False)
    text = printed(capsys, tmp_path, recipe, "--gpu", "a100-40gb")
    assert "stage 1, 6 steps" in text and "generation" not in text and "stage 2" not in text


def test_no_weights_and_no_gpu_are_needed_for_the_loss_of_a_gpu(tmp_path):
    """Triton, which only the target has."""
    made = planned(tiny_recipe(tmp_path, model__dtype="bfloat16", loss__implementation="fused"))
    assert made.place.loss == "fused" and made.place.attention == "tract_varlen"
    with pytest.raises(UserError, match="fused"):
        prepare(made.recipe, lambda text: None)  # here


@given(share=st.floats(0.1, 1.2))
@hypothesis_settings(deadline=None, max_examples=8)
def test_largest_is_the_largest(tiny, share):
    """What is told fits, and 256 tokens more do not, for limits from where little fits to where all does."""
    recipe, data, target = tiny
    whole = replace(recipe, train=replace(recipe.train, max_tokens=4096))
    limit = int(share * estimate.needed(whole, data, target).total)
    found = estimate.needed(recipe, data, target)
    most, all_of_it = fitting.largest(recipe, data, target, limit, found)

    def total(tokens):
        changed = replace(recipe, train=replace(recipe.train, max_tokens=tokens))
        return estimate.needed(changed, data, target).total

    longest = max(len(e.ids) for e in data.train)
    if most is None:
        assert total(longest) > limit
        return
    assert total(most) <= limit and (most % fitting.MULTIPLE == 0 or most == longest)
    if all_of_it:
        assert total(2 * most) == total(most)
    else:
        assert total(most - most % fitting.MULTIPLE + fitting.MULTIPLE) > limit


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_data(folder / "data.jsonl", n=64)
    recipe = tiny_recipe(folder, data__holdout=0.0, train__batch=64, data__share_prompts="off", model__dtype="bfloat16")
    target = Target(device=torch.device("cuda"), world=1, gpu=H100, here=False)
    return recipe, prepare(recipe, lambda text: None), target


@pytest.mark.parametrize(("setting", "share"), [("none", 0), ("selective", 0), ("full", 1), ("1", 1), ("4", 0.5)])
def test_recomputation_is_counted_for_time_alone(tmp_path, setting, share):
    recipe = tiny_recipe(tmp_path, train__activation_checkpointing=setting, data__share_prompts="off")
    made = planned(recipe)
    flops = forecast.flops_of(made.sizes.work, made.sizes.blocks, recipe, made.step)
    micros = [m for step in made.step.packed for rank in step for m in rank]
    forward = sum(made.sizes.work.forward(*m.segments()) for m in micros) / made.step.planned
    assert flops.slowest == pytest.approx(flops.model + share * forward)


def test_ranks_wait_for_the_slowest(tmp_path):
    recipe = tiny_recipe(tmp_path, data__share_prompts="off", train__batch=18, train__max_tokens=128)
    made = planned(recipe, world=3)
    flops, one = (
        forecast.flops_of(made.sizes.work, made.sizes.blocks, recipe, p.step) for p in (made, planned(recipe))
    )
    assert made.step.calls > 1 and one.model == pytest.approx(one.slowest) == pytest.approx(flops.model)
    assert flops.model / 3 < flops.slowest < flops.model / 2


def test_forward_is_a_third_of_the_blocks_work(tmp_path):
    work = planned(tiny_recipe(tmp_path, data__share_prompts="off")).sizes.work
    assert 3 * work.forward([7, 9], [7, 9]) == work.flops([7, 9], [7, 9], 0)


@pytest.mark.parametrize("rank", [0, 8])
def test_what_ranks_send(big, rank):
    """Rings: all but a rank's own part of the weights, twice without those that backward does not gather; gradients in
    float32, with LoRA once a step."""
    recipe = replace(big, lora=replace(big.lora, rank=rank), train=replace(big.train, max_tokens=256))
    assert forecast.traffic(planned(recipe).sizes, recipe, planned(recipe).target, planned(recipe).step).total == 0
    made = planned(recipe, world=4)
    sent = forecast.traffic(made.sizes, recipe, made.target, made.step)
    once = 2 * made.sizes.weights + 2 * made.sizes.again
    assert made.sizes.again == made.sizes.weights - 2 * 128_256 * 4096 - 4096, "the blocks"
    assert made.step.calls > 1 and sent.gathered == pytest.approx(made.step.calls * 0.75 * once)
    assert sent.reduced == pytest.approx((1 if rank else made.step.calls) * 0.75 * 4 * made.sizes.trained)
    kept = replace(recipe, shard=replace(recipe.shard, reshard_after_forward=False))
    assert planned(kept).sizes.again == 0
    hybrid = replace(recipe, shard=replace(recipe.shard, replicate=4))
    whole = forecast.traffic(made.sizes, hybrid, made.target, made.step)
    assert whole.gathered == 0 and whole.reduced == pytest.approx(2 * sent.reduced), "an all-reduce of everything"


@given(st.floats(0.05, 0.5), st.floats(1.01, 2))
@hypothesis_settings(deadline=None, max_examples=20)
def test_more_of_the_peak_is_not_slower(mfu, factor):
    work = perf.Work(trained=10**9, frozen=0, heads=4096, windows=(None,) * 8, head=10**8, head_trained=True)
    sizes = forecast.Sizes(weights=10**9, trained=10**9, again=10**9, blocks=8, cache=8192, work=work)
    sent = forecast.Traffic(gathered=1e9, reduced=1e9)
    flops = forecast.Flops(model=1e15, slowest=1e15)
    slow, fast = (
        forecast.step_time(sizes, flops, sent, forecast.Rates.of(H100, None, share), ways=4, calls=1)
        for share in (mfu, mfu * factor)
    )
    assert fast.total < slow.total and fast.communication == slow.communication
    assert slow.compute == pytest.approx(1e15 / (mfu * 989e12))


def test_generation_ends_with_the_longest_of_a_batch(big):
    """Tokens are the data's; seconds those of each batch's longest, at least what launching takes."""
    made = planned(big)
    rates = forecast.Rates.of(H100, None, 0.4)
    settings = replace(big.generate, batch=16, n=2)
    found = forecast.generation(made.sizes, replace(big, generate=settings), made.data.train, rates)
    lengths = [len(e.ids) - e.prompt_len for e in made.data.train]
    order = sorted(made.data.train, key=lambda e: (-e.prompt_len, e.ids[: e.prompt_len].tobytes()))
    longest = sum(max(len(e.ids) - e.prompt_len for e in order[i : i + 8]) for i in range(0, 256, 8))
    assert found.rationales == 512 and found.tokens == 2 * sum(lengths)
    assert found.seconds > longest * 8 * forecast.HOST
    short = forecast.generation(
        made.sizes, replace(big, generate=replace(settings, max_new_tokens=3)), made.data.train, rates
    )
    assert short.tokens == 512 * 3 and short.seconds < found.seconds


def test_prompts_of_a_batch_are_computed_once(tmp_path, monkeypatch):
    """As generation does; the draws of a prompt share it, too."""
    write_data(tmp_path / "data.jsonl", n=24, siblings=3)
    recipe = tiny_recipe(tmp_path, data__holdout=0.0)
    made = planned(replace(recipe, generate=replace(recipe.generate, batch=24, n=2)))
    seen = []
    forward = perf.Work.forward
    monkeypatch.setattr(perf.Work, "forward", lambda work, q, k: seen.append(q) or forward(work, q, k))
    forecast.generation(made.sizes, made.recipe, made.data.train, forecast.Rates.of(H100, None, 0.4))
    different = {e.ids[: e.prompt_len].tobytes(): e.prompt_len for e in made.data.train}
    assert len(seen) == 2 and len(different) == 8
    assert sum(map(sum, seen)) == sum(different.values()), "three siblings are in one batch"


def test_the_second_stage_trains_on_what_was_written(tmp_path):
    recipe = tiny_recipe(tmp_path, train__max_steps=None, train__epochs=3, train__batch=4)
    assert forecast.second_stage_steps(recipe, 24) == 18
    more = replace(recipe, generate=replace(recipe.generate, n=2))
    assert forecast.second_stage_steps(more, 24) == 36
    assert forecast.second_stage_steps(replace(more, stage2=replace(more.stage2, rationales="both")), 24) == 54


def test_gpus_have_names_of_their_own():
    names = [gpu.name for gpu in gpus.GPUS if gpu.name]
    assert len(set(names)) == len(names) and all(gpus.called(name.upper()).name == name for name in names)
    for gpu in gpus.GPUS:
        stated = int(gpu.name.rpartition("-")[2].removesuffix("gb")) if gpu.name else 0
        assert 0.9 * stated * gpus.GIB <= gpu.memory <= stated * gpus.GIB, "a little less than the name says"
        assert bool(gpu.name) == bool(gpu.bandwidth) == bool(gpu.link) == bool(gpu.single)
        assert gpu.single < gpu.peak


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie-80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA L40S", "l40s-48gb"),
        ("NVIDIA L4", "l4-24gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA A10G", None),
        ("Tesla T4", None),
    ],
)
def test_devices_are_recognised(device, name):
    found = gpus.recognised(device)
    assert (found and found.name) == name


def test_a_machine_that_is_here(monkeypatch, tmp_path):
    """Without --gpu: the device's own name, and its own memory where nothing is stated."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    target = planning.target_of(tiny_recipe(tmp_path), None, 2)
    assert target.gpu.name == "h200-141gb" and target.world == 2 and target.here
    assert planning.described(target) == "2 x h200-141gb (here)"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    properties = type("Properties", (), {"total_memory": 7})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    target = planning.target_of(tiny_recipe(tmp_path), None, None)
    assert target.gpu is None and fitting.room(target) == 7 and "unknown kind" in planning.described(target)


def test_help_needs_no_torch():
    code = "import atexit, sys; atexit.register(lambda: print(*sys.modules)); from tract_fast import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code, "plan", "--help"], capture_output=True, text=True)
    assert "--gpus N" in done.stdout and not {"torch", "transformers", "numpy"} & set(done.stdout.split())


@pytest.mark.parametrize(("setting", "share"), [("none", 0), ("selective", 0), ("full", 1), ("2", 0.5), ("4", 8 / 30)])
def test_blocks_that_are_computed_again(setting, share):
    """As ``recompute`` chooses them: the first of every k."""
    assert forecast.recomputed(setting, 30) == pytest.approx(share)


def test_ranks_without_work_are_told(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, model__dtype="bfloat16")
    text = printed(capsys, tmp_path, recipe, "--gpus", "6", "--gpu", "h100-80gb", "--train.batch", "4")
    assert "micro-batches a step over 6 ranks (first" in text
    assert "2 of 6 ranks have nothing to do: raise train.batch" in text
    text = printed(capsys, tmp_path, recipe, "--gpus", "4", "--gpu", "h100-80gb", "--train.batch", "4")
    assert "nothing to do" not in text


@pytest.mark.parametrize(("compute", "communication"), [(1.0, 3.0), (3.0, 1.0)])
def test_communication_and_arithmetic_overlap(compute, communication):
    each = forecast.StepTime(compute=compute, communication=communication, update=0.5)
    assert each.total == 3.5
