"""Checkpoints that survive, and exports that plain transformers and peft load."""

import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.kills import killed_again_and_again
from tests.tiny_runs import metrics, tiny_recipe
from tract_fast import checkpoint, recipe as recipes, saver, train
from tract_fast.errors import RunStopped, UserError
from tract_fast.sections import Checkpoint

RANK_0 = "rank_00000.safetensors"


def test_only_the_newest_are_kept(tmp_path):
    train.run(tiny_recipe(tmp_path, checkpoint__every=1, checkpoint__keep_last=2))
    names = sorted(p.name for p in checkpoint.folder(tmp_path / "run").iterdir())
    assert names == ["latest", "step_000005", "step_000006"]
    assert sorted(p.suffix for p in checkpoint.latest(tmp_path / "run").iterdir()) == [".json", ".safetensors"]


@pytest.mark.parametrize("moment", ["rename", "pointer"])
def test_killed_while_committing(tmp_path, monkeypatch, moment):
    """Death just before the rename, and between rename and pointer: the previous checkpoint is what a resume finds,
    even where only one is kept."""
    recipe = tiny_recipe(tmp_path, checkpoint__every=2, checkpoint__keep_last=1)
    real = {"rename": os.rename, "pointer": os.replace}[moment]

    class Killed(BaseException):
        pass

    def die(source, target):
        if "step_000004" in str(target) or (moment == "pointer" and str(target).endswith("latest") and four.exists()):
            raise Killed
        return real(source, target)

    four = checkpoint.folder(tmp_path / "run") / "step_000004"
    monkeypatch.setattr(os, {"rename": "rename", "pointer": "replace"}[moment], die)
    with pytest.raises(Killed):
        train.run(recipe)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "run").name == "step_000002"
    assert train.run(recipe) == 0
    assert train.run(tiny_recipe(tmp_path, "whole")) == 0
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_failed_write_keeps_the_previous_checkpoint(tmp_path):
    """A real write error at step 4 (a limit on file size): one sentence, step 2 whole, nothing half-written left."""
    recipe = tiny_recipe(tmp_path, checkpoint__every=2)
    assert train.run(tiny_recipe(tmp_path, checkpoint__every=2, train__max_steps=2)) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(RunStopped, match=r"step 4 could not be written: .*File too large.*step_000002 is whole"):
            train.run(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in checkpoint.folder(tmp_path / "run").iterdir()) == ["latest", "step_000002"]
    assert train.run(recipe) == 0


def test_a_failed_write_may_be_skipped(tmp_path, capsys):
    """checkpoint.on_error: skip goes on, says so, and the last checkpoint is there."""
    recipe = tiny_recipe(tmp_path, checkpoint__every=2, checkpoint__on_error="skip")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    taken = train.train_step

    def room_again(job, i, stop, **options):
        if i == 4:  # what was tried after step 4 has come to nothing by now
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        return taken(job, i, stop, **options)

    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    train.train_step = room_again
    try:
        assert train.run(recipe) == 0
    finally:
        train.train_step = taken
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().out
    assert "warning: checkpoint of step 2 could not be written" in told and "training goes on" in told
    assert checkpoint.latest(tmp_path / "run").name == "step_000006"
    assert not list(checkpoint.folder(tmp_path / "run").glob("*.tmp"))


@pytest.mark.parametrize("place", ["part", "write"], ids=["the copy", "the thread"])
@pytest.mark.parametrize(
    "error",
    [MemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
    ids=["Python's", "PyTorch's"],
)
def test_memory_that_runs_out_while_saving(tmp_path, monkeypatch, capsys, place, error):
    """It is a checkpoint that could not be written, told with what would help; the one before is whole."""
    recipe = tiny_recipe(tmp_path, checkpoint__every=2)
    assert train.run(tiny_recipe(tmp_path, checkpoint__every=2, train__max_steps=2)) == 0
    real, tries = getattr(saver.shards, place), []

    def runs_out(*arguments, **options):
        if place == "part" and "is_main" not in options:  # reading asks for parts too
            return real(*arguments)
        tries.append(1)
        if len(tries) == 1:
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(saver.shards, place, runs_out)
    told = r"checkpoint of step 4 could not be written: out of memory \(.*\): the host holds a copy .*; step_000002 is"
    with pytest.raises(RunStopped, match=told):
        train.run(recipe)
    assert checkpoint.latest(tmp_path / "run").name == "step_000002"
    tries.clear()
    assert train.run(tiny_recipe(tmp_path, checkpoint__every=2, checkpoint__on_error="skip")) == 0
    assert "warning: checkpoint of step 4 could not be written: out of memory" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "run").name == "step_000006"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """Its write is held up until two more steps are done; what it holds is the state of its own step, bit for bit."""
    write, step, go_on = saver.shards.write, train.train_step, threading.Event()

    def held_up(*arguments):
        assert go_on.wait(60)
        return write(*arguments)

    def stepping(job, i, stop, **options):
        record = step(job, i, stop, **options)
        if i == 3:  # steps 3 and 4 are done, and the checkpoint of step 2 is not
            assert checkpoint.latest(tmp_path / "run") is None
            go_on.set()
        return record

    settings = {"checkpoint__every": 2, "checkpoint__keep_last": 9}
    monkeypatch.setattr(saver.shards, "write", held_up)
    monkeypatch.setattr(train, "train_step", stepping)
    assert train.run(tiny_recipe(tmp_path, **settings)) == 0
    monkeypatch.undo()
    assert train.run(tiny_recipe(tmp_path, "plain", **settings)) == 0
    for name in ("step_000002", "step_000004", "step_000006"):
        ours, theirs = (load_file(checkpoint.folder(tmp_path / r) / name / RANK_0) for r in ("run", "plain"))
        assert set(ours) == set(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_best_are_kept(tmp_path):
    recipe = tiny_recipe(
        tmp_path,
        train__eval_every=1,
        train__lr=0.2,
        checkpoint__every=1,
        checkpoint__keep_last=1,
        checkpoint__keep_best=2,
    )
    assert train.run(recipe) == 0
    scores = {line["step"]: line["eval"]["rmse"] for line in metrics(tmp_path / "run") if line.get("eval")}
    best = sorted((step for step in scores if step), key=lambda step: (scores[step], -step))[:2]
    kept = {int(p.name[-6:]) for p in checkpoint.written(checkpoint.folder(tmp_path / "run"))}
    assert kept == {6, *best} and len(set(scores.values())) > 3


@pytest.mark.parametrize(("metric", "best"), [("pearson", 2), ("rmse", 1)], ids=["higher is better", "lower is better"])
def test_which_checkpoints_go(tmp_path, metric, best):
    for step in (1, 2, 3, 4, 9):
        (tmp_path / f"step_{step:06d}").mkdir()
    settings = Checkpoint(keep_last=1, keep_best=1, metric=metric)
    scores = {1: 0.1, 2: 0.9, 3: None, 9: 5.0}
    gone = {int(p.name[-6:]) for p in saver.outdated(tmp_path, 4, settings, scores)}
    assert gone == {1, 2, 3, 9} - {best}, "step 9 is of a run that was killed; a step without a value is no candidate"


def test_one_that_cannot_be_deleted_does_not_stop_the_run(tmp_path, monkeypatch, capsys):
    """As where another machine holds a file of it open on NFS: a warning, and the next save deletes it."""
    real, busy = shutil.rmtree, []

    def not_empty(path, ignore_errors=False, **options):
        if "step_000001" in str(path) and len(busy) < 2:
            busy.append(path)
            if ignore_errors:
                return
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(saver.shutil, "rmtree", not_empty)
    recipe = tiny_recipe(tmp_path, checkpoint__every=1, checkpoint__keep_last=1, train__max_steps=4)
    assert train.run(recipe) == 0
    told = capsys.readouterr().out
    assert told.count("step_000001 could not be deleted ([Errno 39] Directory not empty): the next save tries") == 1
    assert len(busy) == 2, "the deletion, and the save after it"
    assert sorted(p.name for p in checkpoint.folder(tmp_path / "run").iterdir()) == ["latest", "step_000004"]


def test_nothing_in_a_checkpoint_is_run(tmp_path):
    """A pickle in place of any file of it, or beside them, runs no code: it is refused, or not looked at."""
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    good, trap = checkpoint.latest(tmp_path / "run"), tmp_path / "trap"

    class Crafted:
        def __reduce__(self):
            return trap.touch, ()

    pickled = pickle.dumps(Crafted())
    pickle.loads(pickled)
    assert trap.exists(), "the pickle must be one that would have run"
    trap.unlink()
    for name in (".metadata", "__0_0.distcp", "optimizer.pt", "rank_00000.pt"):
        (good / name).write_bytes(pickled)
    assert train.run(tiny_recipe(tmp_path, train__max_steps=3)) == 0
    for name in (RANK_0, "state.json"):
        file = checkpoint.latest(tmp_path / "run") / name
        whole = file.read_bytes()
        file.write_bytes(pickled)
        for use in (
            lambda: train.run(tiny_recipe(tmp_path, train__max_steps=4)),
            lambda: checkpoint.export(tmp_path / "run"),
        ):
            with pytest.raises(UserError, match="is damaged"):
                use()
        file.write_bytes(whole)
    assert not trap.exists()


def test_retention_after_a_kill_before_the_pointer(tmp_path):
    """A later step that no pointer names must not push out the checkpoint that is being written."""
    assert train.run(tiny_recipe(tmp_path, checkpoint__every=2, train__max_steps=4)) == 0
    (checkpoint.folder(tmp_path / "run") / "latest").write_text("step_000002\n")  # as a kill would leave it
    assert train.run(tiny_recipe(tmp_path, checkpoint__keep_last=1, train__max_steps=3)) == 0
    assert sorted(p.name for p in checkpoint.folder(tmp_path / "run").iterdir()) == ["latest", "step_000003"]
    assert checkpoint.latest(tmp_path / "run").name == "step_000003"


def test_what_is_not_a_checkpoint_stays(tmp_path):
    """A copy that its user made is neither counted nor deleted."""
    folder = checkpoint.folder(tmp_path / "run")
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    shutil.copytree(folder / "step_000002", folder / "step_000002_good")
    assert train.run(tiny_recipe(tmp_path, checkpoint__keep_last=1, train__max_steps=3)) == 0
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_000002_good", "step_000003"]


def test_a_damaged_checkpoint(tmp_path):
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    (file,) = checkpoint.latest(tmp_path / "run").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    for use in (
        lambda: train.run(tiny_recipe(tmp_path, train__max_steps=3)),
        lambda: checkpoint.export(tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=r"step_000002 is damaged \(.*write the name of an earlier checkpoint into"):
            use()


def test_an_error_that_is_not_the_disks_is_not_called_one(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(saver.shards, "write", broken)
    with pytest.raises(RuntimeError, match="CUDA error"):
        train.run(tiny_recipe(tmp_path, train__max_steps=1))


def test_files_can_be_read_by_others(tmp_path):
    before = os.umask(0o022)
    try:
        train.run(tiny_recipe(tmp_path, train__max_steps=1))
        judge = checkpoint.export(tmp_path / "run")
    finally:
        os.umask(before)
    files = [p for p in [*(tmp_path / "run").rglob("*"), *judge.iterdir()] if p.is_file()]
    assert len(files) > 8 and all(p.stat().st_mode & 0o044 == 0o044 for p in files)


@pytest.mark.parametrize("name", ["step_000009", "step_000002_good", "../../elsewhere/step_000002", ""])
def test_pointer_to_nothing(tmp_path, name):
    """Nor to anything but a checkpoint of this run under the name that it was given."""
    run_dir = tmp_path / "run"
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    folder = checkpoint.folder(run_dir)
    for copy in (folder / "step_000002_good", tmp_path / "elsewhere" / "step_000002"):
        shutil.copytree(folder / "step_000002", copy)
    (folder / "latest").write_text(f"{name}\n")
    for use in (
        lambda: train.run(tiny_recipe(tmp_path, train__max_steps=3)),
        lambda: checkpoint.export(run_dir),
    ):
        with pytest.raises(UserError, match=r"which is not there: write the name of .* in it: step_000002$"):
            use()


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", 2.0), ("step", "2"), ("step", [1]), ("step", -3), ("step", 4), ("template", 1), ("fingerprint", None)],
)
def test_a_state_that_says_something_odd(tmp_path, key, value):
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    file = checkpoint.latest(tmp_path / "run") / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"step_000002 is damaged \(state.json: .*\)"):
        train.run(tiny_recipe(tmp_path, train__max_steps=3))


def rewritten(file, change, rows=None):
    """A rank's file with its tensors changed in place by ``change``, and its metadata of rows."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata=metadata if rows is None else {"rows": rows})


WEIGHT, MOMENT = "model.model.norm.weight", "optimizer.model.norm.weight.exp_avg"


@pytest.mark.parametrize(
    ("change", "rows", "told"),
    [
        (lambda t: None, "[]", "metadata of its rows"),
        (lambda t: None, json.dumps({WEIGHT: [0]}), "metadata of its rows"),
        (lambda t: None, json.dumps({WEIGHT: [0, 2.5]}), "metadata of its rows"),
        (lambda t: None, json.dumps({WEIGHT: [-1, 32]}), "metadata of its rows"),
        (lambda t: None, json.dumps({WEIGHT: [0, 33]}), "rows of .*norm.weight are missing"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:1].clone()}), "{}", r"norm.weight \(32,\) is as \(1,\) in the files"),
        (lambda t: t.update({WEIGHT: t[WEIGHT] > 0}), None, "norm.weight is BOOL and not float32"),
        (lambda t: t[WEIGHT].fill_(float("nan")), None, "norm.weight has values that are not finite"),
        (lambda t: t[MOMENT].fill_(float("inf")), None, "exp_avg has values"),
    ],
)
def test_tensors_that_are_not_ours(tmp_path, change, rows, told):
    """What a stranger may have written is refused by name, not trained on."""
    assert train.run(tiny_recipe(tmp_path, train__max_steps=2)) == 0
    rewritten(checkpoint.latest(tmp_path / "run") / RANK_0, change, rows)
    with pytest.raises(UserError, match=rf"step_000002 is damaged \(.*{told}"):
        train.run(tiny_recipe(tmp_path, train__max_steps=3))
    if "exp_avg" not in told:
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.export(tmp_path / "run")


def test_the_last_checkpoint_must_be_there(tmp_path, monkeypatch):
    """Also where others may be skipped: a run that ends without its result has failed."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saver.shards, "write", full)
    with pytest.raises(RunStopped, match="checkpoint of step 6 could not be written"):
        train.run(tiny_recipe(tmp_path, checkpoint__on_error="skip"))


def test_what_stops_a_run_waits_for_its_checkpoint(tmp_path, monkeypatch):
    """A checkpoint that is being written when the run is stopped by an error is whole before the process ends."""
    write, step = saver.shards.write, train.train_step

    def slow(*arguments):
        time.sleep(1)
        write(*arguments)

    def stops(job, i, stop, **options):
        if i == 2:
            raise RunStopped("enough")
        return step(job, i, stop, **options)

    monkeypatch.setattr(saver.shards, "write", slow)
    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(RunStopped, match="enough"):
        train.run(tiny_recipe(tmp_path, checkpoint__every=2))
    assert checkpoint.latest(tmp_path / "run").name == "step_000002"


def test_a_failed_write_stops_the_run_at_its_next_step(tmp_path, monkeypatch):
    """Not at its next save, which may be hours later."""
    failing, step = threading.Event(), train.train_step

    def full(*arguments):
        failing.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    def stepping(job, i, stop, **options):
        if i == 3:
            assert failing.wait(10)
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join(10)
        return step(job, i, stop, **options)

    monkeypatch.setattr(saver.shards, "write", full)
    monkeypatch.setattr(train, "train_step", stepping)
    with pytest.raises(RunStopped, match="checkpoint of step 3 could not be written"):
        train.run(tiny_recipe(tmp_path, checkpoint__every=3, train__max_steps=9))
    assert max(line["step"] for line in metrics(tmp_path / "run")) < 6


def test_too_little_space_is_told_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"run\.dir|checkpoint\.keep_last"):
        train.run(tiny_recipe(tmp_path))
    assert not (tmp_path / "run").exists(), "a start that is refused leaves nothing"
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"run\.dir"):
        train.run(tiny_recipe(tmp_path))
    assert (tmp_path / "run").is_dir(), "what was there before stays"


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_export_after_full_fine_tuning(tmp_path, family):
    """Plain transformers loads the folder and computes the logits of the trained model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe = tiny_recipe(tmp_path, family=family)
    train.run(recipe)
    out = checkpoint.export(tmp_path / "run")
    lm = AutoModelForCausalLM.from_pretrained(out)
    weights = checkpoint.trained_weights(checkpoint.latest(tmp_path / "run"))
    for name, value in lm.named_parameters():
        assert torch.equal(value, weights[name]), name
    tract = json.loads((out / "tract.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert [tokenizer.decode([i]).strip() for i in tract["token_ids"]] == tract["labels"] == ["1", "2", "3", "4", "5"]
    assert tract["values"] == [1, 2, 3, 4, 5] and tract["normalize"] == "scores"
    assert tract["prompt_template"] is None, "these prompts are the data's own"
    with_template = checkpoint.Progress(step=6, fingerprint="", template=True)
    found = checkpoint.find_scale(tokenizer, ("1", "2"), (1, 2), rationale="keep")
    assert "###Score Rubrics" in checkpoint.describe(recipe, found, with_template)["prompt_template"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_of_lora(tmp_path, dtype, capsys):
    """Adapter on the base model, merged folder, and the trained model give the same logits; no lora_B is zero."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    recipe = tiny_recipe(tmp_path, lora__rank=4, train__lr=0.02, model__dtype=dtype)
    train.run(recipe)
    out = checkpoint.export(tmp_path / "run", tmp_path / "judge")
    assert "logits on a text differ by" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=getattr(torch, dtype))
    ids = torch.randint(300, (1, 20))
    untouched = base(ids).logits.float()
    adapted = PeftModel.from_pretrained(base, str(out / "adapter"))
    assert all(p.any() for n, p in adapted.named_parameters() if "lora_B" in n)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert merged.dtype == getattr(torch, dtype)
    change = (adapted(ids).logits.float() - untouched).norm()
    difference = (adapted(ids).logits.float() - merged(ids).logits.float()).norm()
    assert change > 0.05 * untouched.norm(), "the run must have learnt something for this test to mean anything"
    assert difference < (1e-5 if dtype == "float32" else 0.02) * untouched.norm()
    stored = checkpoint.trained_weights(checkpoint.latest(tmp_path / "run"))
    for name, value in adapted.base_model.model.named_parameters():
        if "lora_" in name:
            torch.testing.assert_close(value.float(), stored[name], msg=name)
    for part in ("adapter", "merged"):
        assert json.loads((out / part / "tract.json").read_text())["labels"] == ["1", "2", "3", "4", "5"]


def test_export_of_a_given_step(tmp_path):
    train.run(tiny_recipe(tmp_path, checkpoint__every=2, checkpoint__keep_last=5))
    with pytest.raises(UserError, match="no checkpoint of step 3 to export"):
        checkpoint.export(tmp_path / "run", step=3)
    with pytest.raises(UserError, match="holds no checkpoint to export"):
        checkpoint.export(tmp_path / "elsewhere")
    early = load_file(checkpoint.export(tmp_path / "run", tmp_path / "early", step=2) / "model.safetensors")
    late = load_file(checkpoint.export(tmp_path / "run", tmp_path / "late") / "model.safetensors")
    assert not torch.equal(early["model.norm.weight"], late["model.norm.weight"])


@pytest.mark.soak
def test_killed_at_random_instants(tmp_path):
    """20 SIGKILLs; afterwards the metrics are those of a run that was never killed."""
    recipe = tiny_recipe(tmp_path, train__max_steps=300, checkpoint__every=7, train__eval_every=50)
    (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
    command = [sys.executable, "-m", "tract_fast", "train", str(tmp_path / "recipe.yaml")]
    lines = tmp_path / "run" / "metrics.jsonl"
    steps = lambda: lines.read_text().count("\n") if lines.exists() else 0  # noqa: E731
    kills = killed_again_and_again(command, steps, most=20, rng=random.Random(0), within=1.0)
    print(f"{kills} kills")
    assert kills >= 5 and train.run(recipe) == 0
    train.run(tiny_recipe(tmp_path, "whole", train__max_steps=300, checkpoint__every=7, train__eval_every=50))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_is_really_full(tmp_path):
    """A tmpfs with room for one checkpoint and a bit: the run stops with one sentence, the checkpoint loads."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], check=True)
    try:
        recipe = tiny_recipe(tmp_path, checkpoint__every=2, run__dir=str(small / "run"))
        (tmp_path / "recipe.yaml").write_text(recipes.dump(recipe))
        command = [sys.executable, "-m", "tract_fast", "train", str(tmp_path / "recipe.yaml")]
        subprocess.run([*command, "--train.max_steps", "2"], check=True, capture_output=True)
        longer = [*command, "--train.max_steps", "2000", "--checkpoint.every", "1000"]
        process = subprocess.Popen(longer, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        lines = small / "run" / "metrics.jsonl"
        while lines.read_text().count("\n") < 8:  # it is past the check of free space and training
            assert process.poll() is None
            time.sleep(0.05)
        filler = small / "filler"
        filler.write_bytes(b"x" * (shutil.disk_usage(small).free - 60_000))
        _, told = process.communicate(timeout=120)
        assert process.returncode == 1 and "Traceback" not in told, told
        assert len(told.strip().splitlines()) == 1 and "No space left" in told, told
        print(told)
        assert checkpoint.latest(small / "run").name == "step_000002"
        done = subprocess.run(command, capture_output=True, text=True)  # refused at the start, before any step
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        filler.unlink()
        subprocess.run(command, check=True, capture_output=True)
        assert checkpoint.latest(small / "run").name == "step_000006"
    finally:
        subprocess.run(["umount", str(small)], check=True)
