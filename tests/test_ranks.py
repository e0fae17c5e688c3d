"""Two ranks (gloo, two processes, started once) compute what one does: sharding, checkpoints, resuming."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ranks import (
    Task,
    files_of_main,
    on_two_ranks,
    run,
    run_apart,
    run_unlike,
    scoreless_gradients,
    start_of_main,
    trained_steps,
)
from tests.tiny_runs import metrics, save_model, tiny_recipe, write_data
from tract_fast import checkpoint, train
from tract_fast.attention import DOCUMENTS
from tract_fast.errors import UserError
from tract_fast.prepare import prepare
from tract_fast.shards import Stored
from tract_fast.sharing import choose_sharing

LORA = {"lora__rank": 4, "train__lr": 0.02}
CASES = {  # settings of a run, and how near two ranks must come to one (relative)
    "full": ({}, 1e-5),
    "tied": ({"family": "llama_tied"}, 1e-5),
    "gemma": ({"family": "gemma2"}, 1e-5),
    "replicas": ({"shard__replicate": 2}, 1e-5),
    "replicas-tied-lora": ({"family": "llama_tied", "shard__replicate": 2, **LORA}, 1e-5),
    "lora": (LORA, 1e-5),
    "lora-tied": ({"family": "llama_tied", **LORA}, 1e-5),
    "lora-of-rank-1": ({**LORA, "lora__rank": 1}, 1e-5),  # lora_A has one row: the second rank has none of it
    "micro-batches": ({"train__batch": 12, "train__max_tokens": 110}, 1e-5),
    "micro-batches-lora": ({"train__batch": 12, "train__max_tokens": 110, **LORA}, 1e-5),
    "uneven": ({"train__batch": 5}, 1e-5),
    "a-rank-without-rows": ({"train__batch": 1}, 1e-5),
    "sequence-mean": ({"train__batch": 5, "loss__ce_reduction": "sequence", "loss__normalize": "vocab"}, 1e-5),
    "recompute": ({"train__activation_checkpointing": "full"}, 1e-5),
    "recompute-some": ({"train__activation_checkpointing": "2", **LORA}, 1e-5),
    "recompute-selective": ({"train__activation_checkpointing": "selective"}, 1e-5),
    "reference": ({"loss__implementation": "reference"}, 1e-5),
    "kept-gathered": ({"shard__reshard_after_forward": False}, 1e-5),
    "offload": ({"shard__cpu_offload": True}, 1e-5),
    "bfloat16": ({"model__dtype": "bfloat16"}, 0.06),
    "bfloat16-lora": ({"model__dtype": "bfloat16", **LORA}, 0.06),
}
EXACT = {"loss__gradient": "sampled", "loss__eps": 2.0**-20}  # nearly every entry is certain
# 18 examples are 4 steps of 5, 5, 5 and 3: each half ends with an epoch
RUN = {"train__max_steps": 8, "train__batch": 5, "checkpoint__every": 4, "train__eval_every": 4}
RUN |= {"train__schedule": "constant"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two ranks have done everything that the tests look at, and what failed."""
    folder = tmp_path_factory.mktemp("pair")
    tasks = [
        Task(name, trained_steps, (tiny_recipe(folder, **settings), folder / f"{name}.two"))
        for name, (settings, _) in CASES.items()
    ]
    tasks += [Task("sampled", trained_steps, (tiny_recipe(folder, **EXACT), folder / "sampled.two"))]
    tasks += [Task("scoreless", scoreless_gradients, (tiny_recipe(folder), folder / "scoreless.two"))]
    renamed(folder / "renamed")
    whole = tiny_recipe(folder, model__path=str(folder / "renamed"), **LORA)
    tasks += [Task("read-by-one", trained_steps, (whole, folder / "read-by-one.two"))]
    several = tiny_recipe(folder, data__train=str(thrice(folder)), train__batch=7)
    tasks += [Task("shared-prompts", trained_steps, (several, folder / "shared-prompts.two"))]
    tasks += [Task("apart", run_apart, tuple(tiny_recipe(folder, f"apart-{i}") for i in range(2)))]
    tasks += unlike(folder)
    tasks += [Task("files-of-main", files_of_main, (tiny_recipe(folder, "files-of-main"),))]
    half = {**RUN, "train__max_steps": 4}
    for name, more in (
        ("plain", {}),
        ("lora1", {**LORA, "lora__rank": 1}),
        ("dropout", {**LORA, "lora__dropout": 0.2}),
    ):
        tasks += [
            Task(f"{name}-whole", run, (tiny_recipe(folder, f"{name}-whole", **RUN, **more),)),
            Task(f"{name}-half", run, (tiny_recipe(folder, f"{name}-parts", **{**half, **more}),)),
            Task(f"{name}-rest", run, (tiny_recipe(folder, f"{name}-parts", **RUN, **more),)),
        ]
    tasks += [Task("start-of-main", start_of_main, (folder / "plain-parts",))]
    # 1 -> 2: the first half was done by one rank
    assert train.run(tiny_recipe(folder, "one-two", **half)) == 0
    tasks += [Task("one-two", run, (tiny_recipe(folder, "one-two", **RUN, shard__replicate=2),))]
    # 2 -> 1 -> 2: the middle is done by one rank, after this
    tasks += [Task("two-one-two", run, (tiny_recipe(folder, "two-one-two", **half),))]
    failed = on_two_ranks(tasks, folder)
    middle = tiny_recipe(folder, "two-one-two", **{**RUN, "train__max_steps": 6})
    assert "two-one-two" in failed or train.run(middle) == 0
    return folder, failed


def unlike(folder):
    """Runs whose second rank has something else than the first, and how that is told."""
    one = tiny_recipe(folder, "unlike")
    save_model(folder / "theirs", seed=1)
    config = json.loads((folder / "theirs" / "config.json").read_text())
    (folder / "theirs" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    save_model(folder / "longer")
    weights = load_file(folder / "longer" / "model.safetensors")
    save_file({**weights, "another": torch.zeros(1)}, folder / "longer" / "model.safetensors", {"format": "pt"})
    data = write_data(folder / "theirs.jsonl", seed=1)
    others = {
        "setting": ({"train__lr": 0.5, "run__nproc": 2}, "train.lr is 0.5 and not 0.001: give every node"),
        "data": (
            {"data__train": str(data)},
            "data.train is .*; training data is",
        ),
        "configuration": ({"model__path": str(folder / "theirs")}, "model.path is .*; model configuration is"),
        "files": ({"model__path": str(folder / "longer")}, "model.path is .*; model file model.safetensors is"),
    }
    return [
        Task(f"unlike-{name}", run_unlike, (one, tiny_recipe(folder, "unlike", **changes)), {"told": told})
        for name, (changes, told) in others.items()
    ]


def renamed(folder):
    """A model whose file has the names of the bare backbone, which transformers renames while it loads."""
    file = save_model(folder) / "model.safetensors"
    save_file({k.removeprefix("model."): v for k, v in load_file(file).items()}, file, {"format": "pt"})


def thrice(folder):
    """Data in which every prompt has three judgements."""
    records = [json.loads(line) for line in write_data(folder / "once.jsonl").read_text().splitlines()]
    path = folder / "thrice.jsonl"
    path.write_text(
        "".join(
            json.dumps(r | {"score": score, "question": r["prompt"]}) + "\n" for r in records for score in (1, 3, 5)
        )
    )
    return path


def results(pair, name, reference=None, work=trained_steps, **settings):
    folder, failed = pair
    assert name not in failed, failed[name]
    file = folder / f"{reference or name}.one"
    work(tiny_recipe(folder, **settings), file)
    return load_file(folder / f"{name}.two"), load_file(file)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_what_one_does(pair, name):
    """Losses, norms and weights of four optimizer steps, every gradient of the first."""
    settings, near = CASES[name]
    two, one = results(pair, name, **settings)
    assert set(two) == set(one) and any(key.startswith("grad.") for key in one)
    for key in one:
        both_small = key.startswith("grad.") and "lora_A" in key  # zero at first, as lora_B is
        assert error(two[key], one[key]) < near or (both_small and not one[key].any() and not two[key].any()), key
    moved = [key for key in one if key.startswith("weight.")]
    assert moved and all(one[key].any() for key in moved)


def test_a_sampled_gradient_on_two_ranks(pair):
    """Drawn so finely that nearly nothing is left to chance, it is the exact one."""
    two, one = results(pair, "sampled")
    for key in one:
        if key.startswith("grad."):
            assert error(two[key], one[key]) < 1e-3, key


def test_a_model_that_one_rank_reads_for_all(pair):
    """As a GGUF file is: handed on tensor by tensor, adapters the same."""
    two, one = results(pair, "read-by-one", **LORA)
    assert all(error(two[key], one[key]) < 1e-5 for key in one if key.startswith("weight."))
    assert error(two["records"], one["records"]) < 1e-5


def test_shared_prompts_on_two_ranks(pair):
    """Sharing does happen, and two ranks compute what one does."""
    folder, _ = pair
    settings = {"data__train": str(folder / "thrice.jsonl"), "train__batch": 7}
    data = prepare(tiny_recipe(folder, **settings), lambda text: None)
    found = choose_sharing(tiny_recipe(folder, **settings), data.config, DOCUMENTS, data.train, 2)
    assert found.share == "prompts", found.line
    # the order is by prompt where prompts are shared: the one rank shares too, in micro-batches of its own
    two, one = results(pair, "shared-prompts", **settings)
    assert all(error(two[key], one[key]) < 1e-5 for key in one)


def test_a_run_dir_that_ranks_do_not_share_is_refused(pair):
    folder, failed = pair
    assert "apart" not in failed, failed["apart"]
    assert not (folder / "apart-0" / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["setting", "data", "configuration", "files"])
def test_ranks_that_would_train_different_things_are_refused(pair, what):
    folder, failed = pair
    assert f"unlike-{what}" not in failed, failed[f"unlike-{what}"]
    assert not (folder / "unlike" / "metrics.jsonl").exists()


@pytest.mark.parametrize("what", ["start", "files"])
def test_what_the_main_rank_has_found_is_so_for_all(pair, what):
    _, failed = pair
    assert f"{what}-of-main" not in failed, failed[f"{what}-of-main"]


@pytest.mark.soak
def test_compiled_blocks_on_two_ranks(tmp_path):
    recipe = tiny_recipe(tmp_path, train__compile=True)
    failed = on_two_ranks([Task("compiled", trained_steps, (recipe, tmp_path / "two"))], tmp_path)
    assert not failed, failed
    trained_steps(tiny_recipe(tmp_path), tmp_path / "one")
    two, one = load_file(tmp_path / "two"), load_file(tmp_path / "one")
    assert all(error(two[key], one[key]) < 1e-4 for key in one)


def test_a_rank_without_a_score(pair):
    two, one = results(pair, "scoreless", work=scoreless_gradients)
    for key in one:
        assert error(two[key], one[key]) < 1e-5, key


def state(run_dir, step):
    stored = Stored((checkpoint.folder(Path(run_dir)) / f"step_{step:06d}").glob("*.safetensors"))
    return {name: stored.whole(name) for name in stored.shapes}


@pytest.mark.parametrize("name", ["plain", "lora1", "dropout"])
def test_resume_of_two_ranks_is_bitwise(pair, name):
    folder, failed = pair
    assert not {f"{name}-{part}" for part in ("whole", "half", "rest")} & set(failed), failed
    whole, parts = (state(folder / f"{name}-{kind}", 8) for kind in ("whole", "parts"))
    assert set(whole) == set(parts) and len(whole) > 8
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())
    assert metrics(folder / f"{name}-whole") == metrics(folder / f"{name}-parts")


def test_each_rank_writes_its_own_rows(pair):
    """Two files that hold half each; with replicas one has all of the rows; optimizer state is split as weights are."""
    folder, _ = pair
    sizes = {}
    for name in ("plain-whole", "one-two"):
        files = sorted((checkpoint.folder(folder / name) / "step_000008").glob("*.safetensors"))
        assert [file.name for file in files] == ["rank_00000.safetensors", "rank_00001.safetensors"]
        sizes[name] = [sum(t.numel() for t in load_file(file).values()) for file in files]
    first, second = sizes["plain-whole"]
    assert abs(first - second) < 0.05 * first
    assert sizes["one-two"] == [first + second, 0]


@pytest.mark.parametrize("name", ["one-two", "plain-whole"])
def test_another_number_of_ranks_agrees_to_rounding(pair, name):
    """One rank's run, two ranks', and one whose second half two ranks did: same data order, near the same numbers."""
    folder, failed = pair
    assert name not in failed, failed
    alone = folder / "alone"
    if not alone.exists():
        assert train.run(tiny_recipe(folder, "alone", **RUN)) == 0
    for here, there in zip(metrics(alone), metrics(folder / name), strict=True):
        assert here.get("eval", here) == pytest.approx(there.get("eval", there), rel=1e-3, abs=1e-6)
        assert [here.get(k) for k in ("step", "tokens", "rows")] == [there.get(k) for k in ("step", "tokens", "rows")]
    ours, theirs = state(alone, 8), state(folder / name, 8)
    for key, value in ours.items():
        assert error(theirs[key], value) < 1e-3, key


def test_two_then_one_then_two(pair):
    """The data order goes on through all changes: the metrics file has every step once, with the same tokens."""
    folder, failed = pair
    assert "two-one-two" not in failed, failed
    again = on_two_ranks([Task("last", run, (tiny_recipe(folder, "two-one-two", **RUN),))], folder)
    assert not again, again
    lines, alone = metrics(folder / "two-one-two"), metrics(folder / "plain-whole")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    for here, there in zip([x for x in lines if "loss" in x], [x for x in alone if "loss" in x], strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-6)
    ours, theirs = state(folder / "plain-whole", 8), state(folder / "two-one-two", 8)
    assert all(error(theirs[key], value) < 1e-3 for key, value in ours.items())


@pytest.mark.parametrize("name", ["plain-whole", "lora1-whole"])
def test_export_of_a_sharded_checkpoint(pair, name):
    """Plain transformers (and peft) compute the trained model's logits; no lora_B is zero; it can be repeated."""
    from transformers import AutoModelForCausalLM

    folder, _ = pair
    out = checkpoint.export(folder / name, folder / f"{name}-judge")
    again = checkpoint.export(folder / name, folder / f"{name}-judge-again")
    merged = out if name == "plain-whole" else out / "merged"
    first = load_file(merged / "model.safetensors")
    assert all(
        torch.equal(v, first[k]) for k, v in load_file(again / merged.relative_to(out) / "model.safetensors").items()
    )
    lm = AutoModelForCausalLM.from_pretrained(merged)
    ids = torch.arange(3, 40)[None]
    weights = checkpoint.trained_weights(checkpoint.latest(folder / name))
    if name == "plain-whole":
        from tests.tiny_models import tiny_lm

        plain = tiny_lm("llama", vocabulary=lm.config.vocab_size)
        plain.load_state_dict(weights)
        torch.testing.assert_close(lm(ids).logits, plain(ids).logits)
        return
    from peft import PeftModel

    assert all(value.any(dim=1).all() for key, value in weights.items() if "lora_B" in key)
    base = AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(out / "adapter"))
    stored = {n: p for n, p in adapted.base_model.model.named_parameters() if "lora_" in n}
    assert stored and all(torch.equal(p, weights[n]) for n, p in stored.items())
    torch.testing.assert_close(adapted(ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_lacks_a_ranks_file(pair):
    folder, _ = pair
    copy = shutil.copytree(folder / "plain-whole", folder / "torn")
    (checkpoint.latest(copy) / "rank_00001.safetensors").unlink()
    with pytest.raises(UserError, match="2 ranks wrote it and it has 1 files"):
        checkpoint.export(copy)
    state_file = checkpoint.latest(copy) / "state.json"
    state_file.write_text(json.dumps(json.loads(state_file.read_text()) | {"world": 1}))
    with pytest.raises(UserError, match=r"rows of .* are missing"):
        checkpoint.export(copy)
