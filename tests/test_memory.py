"""Memory that really runs out: one message that says what was held and what would help."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import checkpoint, estimate, memory, recipe as recipes, resume, trace
from tract_fast.errors import UserError
from tract_fast.prepare import prepare

RUN = """
import resource, sys
import torch
from tract_fast import launch, recipe, train, memory, saver, evaluate, log
from tract_fast.cli import main
torch.set_num_threads(1)
torch.randn(300, 300) @ torch.randn(300, 300)
import transformers.models.llama.modeling_llama
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]), now + int(sys.argv[1])))
sys.exit(main(["train", sys.argv[2]]))
"""


def big(tmp_path, **changes):
    """A step that holds hundreds of megabytes: all logits of 1200 examples, and what ``selective`` would not keep."""
    write_data(tmp_path / "data.jsonl", n=2000)
    settings = {"train__batch": 1200, "train__max_tokens": 100_000, "loss__implementation": "reference"}
    settings |= {"model__lean": "off"}
    return tiny_recipe(tmp_path, data__holdout=0.0, **settings, **changes)


def test_out_of_memory(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(recipes.dump(big(tmp_path)))
    done = subprocess.run([sys.executable, "-c", RUN, str(500 * 2**20), str(path)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"out of memory at step 1 \(.*allocate.*\); held: weights 0.00 GiB, gradients", line), line
    order = [
        line.index(s) for s in ("selective (about", "checkpointing full (about", "train.max_tokens", "loss.implem")
    ]
    assert order == sorted(order) and re.search(r"about \d\.\d\d of \d\.\d\d GiB less", line)


def test_remedies_are_real(tmp_path):
    """Each is a setting, saves memory by the estimate, and those that change the result come last."""
    recipe = big(tmp_path)
    data = prepare(recipe, lambda text: None)
    longest = max(len(e.ids) for e in data.train)
    target = estimate.this_machine(1)
    before = estimate.needed(recipe, data, target).total
    for _, changed, ranks in memory.changes(recipe, longest, target):
        assert estimate.needed(changed, data, replace(target, world=ranks)).total <= before
    told = memory.remedies(recipe, data, target)
    assert "GiB less), train.max_tokens" in told and told.endswith("; another result: in another run.dir)")
    names = [setting.split()[0] for setting, *_ in memory.changes(recipe, longest, target)]
    assert names[:2] == 2 * ["train.activation_checkpointing"] and names[-1] == "lora.rank"
    assert told.index("checkpointing selective (about") < told.index("checkpointing full (about")
    assert "fits" not in told and "too much" not in told, "a CPU's memory is not known"
    assert all(name in recipes.FIELDS for name in names if "." in name)


@pytest.mark.parametrize("gradient", ["exact", "sampled"])
def test_a_run_can_go_on_with_what_would_help(tmp_path, gradient):
    """Whatever is advised and not said to need another run.dir, a run that has a checkpoint may change."""
    settings = {"shard__replicate": 2, "shard__reshard_after_forward": False, "loss__gradient": gradient}
    recipe = tiny_recipe(tmp_path, **settings, loss__implementation="reference" if gradient == "exact" else "auto")
    first = checkpoint.folder(tmp_path / "run") / "step_000001"
    first.mkdir(parents=True)
    (first / "state.json").write_text(json.dumps({"step": 1, "fingerprint": "", "template": False}))
    (first.parent / "latest").write_text(first.name)
    (tmp_path / "run" / "recipe.yaml").write_text(recipes.dump(recipe))
    target = estimate.Target(device=torch.device("cuda"), world=2, gpu=None)
    offered = {setting: changed for setting, changed, _ in memory.changes(recipe, 100, target)}
    needs_another = {"data.share_prompts off", "lora.rank 8 (adapters instead of all weights)"}
    if gradient == "sampled":
        needs_another.add("train.max_tokens 100")
    assert len(offered) == (10 if gradient == "exact" else 9)
    for setting, changed in offered.items():
        if setting in needs_another:
            with pytest.raises(UserError, match="of another recipe"):
                resume.resume_point(changed)
        else:
            assert resume.resume_point(changed) == first, setting


def test_advice_fits_the_longest_example_of_all(tmp_path):
    """train.max_tokens must hold held-out examples too, else the run would be refused at its start."""
    recipe = big(tmp_path)
    data = prepare(recipe, lambda text: None)
    long = replace(data.train[0], ids=np.zeros(500, dtype=np.int64))
    assert "train.max_tokens 500 " in memory.remedies(recipe, replace(data, held_out=[long]), estimate.this_machine(1))


def test_sharing_off_where_it_takes_memory(tmp_path):
    """The keys that siblings gather are many where their prompt is long and they are short."""
    plain = big(tmp_path)
    path = write_data(tmp_path / "siblings.jsonl", n=2000, siblings=20)
    recipe = replace(plain, data=replace(plain.data, train=str(path)), train=replace(plain.train, max_tokens=2000))
    told = memory.remedies(recipe, prepare(recipe, lambda text: None), estimate.this_machine(1))
    assert re.search(r"data.share_prompts off \(about [^)]*; another result: in another run.dir\)", told), told


def test_sharding_divides_weights_and_state(tmp_path):
    recipe = tiny_recipe(tmp_path, shard__replicate=2)
    data = prepare(recipe, lambda text: None)
    one, many = (estimate.needed(recipe, data, replace(estimate.this_machine(1), world=w)).tensors for w in (1, 8))
    for what in (trace.WEIGHTS, trace.STATE):
        assert one[what] <= 4 * many[what] < 1.02 * one[what], "four ways, the first rank's rows rounded up"


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("x")])
def test_other_errors_pass(tmp_path, error):
    recipe = tiny_recipe(tmp_path)
    data = prepare(recipe, lambda text: None)
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
    with (
        pytest.raises(type(error), match=str(error)),
        memory.watched(recipe, data, 1, torch.nn.Linear(2, 2), optimizer, "here"),
    ):
        raise error
