"""The training loop: the same code for one rank and for many, on any device.

Each optimizer step: plan (a pure function of the step) -> pack -> forward, backward per micro-batch with losses divided
by the step's global counts -> one transfer of the step's sums to the host -> clip -> AdamW.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from tract_fast import (
    alike,
    checkpoint,
    estimate,
    evaluate,
    feed,
    host,
    log,
    memory,
    model,
    optim,
    perf,
    quick_gguf,
    recipe as recipes,
    resume,
    shard,
    sharing,
    tally,
)
from tract_fast.checkpoint import Progress
from tract_fast.data import batch as batches
from tract_fast.data.prompt import Encoded
from tract_fast.errors import RunStopped, UserError
from tract_fast.launch import STOPPED, Joined, StopSignal, follow_launcher
from tract_fast.loss import proposal
from tract_fast.prepare import Prepared, prepare
from tract_fast.recipe import Recipe
from tract_fast.saver import Saver
from tract_fast.shard import Ranks


@dataclass
class Job:
    """Everything one run's steps use."""

    recipe: Recipe
    ranks: Ranks
    data: Prepared
    model: model.TractModel
    optimizer: torch.optim.Optimizer
    total: int  # optimizer steps of the whole run
    sharing: sharing.Sharing
    feed: feed.Feed
    work: perf.Work | None  # what the model multiplies; None: not known for this architecture
    peak: float | None  # FLOP/s of a device at its best

    @property
    def run_dir(self) -> Path:
        return Path(self.recipe.run.dir)

    def memory_watched(self, doing: str) -> contextlib.AbstractContextManager:
        """Tell what is held and what would help where memory runs out inside."""
        return memory.watched(self.recipe, self.data, self.ranks.world, self.model, self.optimizer, doing)


def run(recipe: Recipe, dry_run: bool = False, joined: Joined | None = None) -> int:
    """Train by a recipe, or with ``dry_run`` show what would be done; returns the process's exit code.

    Writes ``recipe.yaml``, ``metrics.jsonl``, ``left_out.jsonl`` and ``checkpoints/`` in ``run.dir``. One that
    holds a checkpoint goes on from it. ``joined``: this process is one of several ranks, each of which calls it. Raises
    UserError before any work where a setting cannot work, RunStopped where a run cannot go on.
    """
    say = print if joined is None or joined.rank == 0 else lambda text: None
    for warning in recipe.warnings():
        say(f"warning: {warning}")
    log.check_trackers(recipe.train.trackers)
    start = resume.resume_point(recipe)
    if dry_run:
        estimate.show(recipe, prepare(recipe, say), start)
        return 0
    run_dir = Path(recipe.run.dir)
    with contextlib.ExitStack() as held:
        held.enter_context(checkpoint.made_folder(run_dir, "run.dir"))
        if joined:
            follow_launcher()
            say(f"ranks: {joined.world}, started by {joined.by}")
        until_loaded = held.enter_context(contextlib.ExitStack())
        until_loaded.enter_context(quick_gguf.kept())
        data = prepare(recipe, say)  # before the ranks meet: none waits for another's tokenizer with a clock running
        ranks = held.enter_context(
            shard.start_ranks(joined, replicate=recipe.shard.replicate, timeout=recipe.run.timeout)
        )
        shard.check_shared(run_dir, ranks)
        if ranks.is_main:
            held.enter_context(checkpoint.locked(run_dir, "run.dir"))
        say(f"device: {ranks.device}, rank {ranks.rank} of {ranks.world}, {torch.get_num_threads()} threads")
        if recipe.model.dtype == "bfloat16" and perf.slow_bfloat16(ranks.device):
            say("warning: model.dtype = bfloat16 is slow here (a CPU without 16-bit products): try float32")
        with shard.peers_watched(ranks):
            alike.check_alike(recipe, data, ranks)
            nothing_yet = (torch.nn.Module(), None, "while the model was loaded")
            with memory.watched(recipe, data, ranks.world, *nothing_yet):
                job = assemble(recipe, ranks, data, say)
            until_loaded.close()
            done = restore(job, agreed(start, run_dir, ranks), say)
            if ranks.is_main:
                open_run_dir(job, done)
            return loop(job, done)


def assemble(recipe: Recipe, ranks: Ranks, data: Prepared, say: Callable[[str], None]) -> Job:
    """Build and shard the model, make the optimizer, count the steps."""
    dtype = model.DTYPES[recipe.model.dtype]
    say(f"host memory: {host.keep_freed_memory(ranks.device)}")
    attention_name, _ = model.choose_attention(recipe.model, data.config, ranks.device)
    shared = sharing.choose_sharing(recipe, data.config, attention_name, data.train, ranks.world)
    say(shared.line)
    share = shared.share is not None
    settings, lengths = recipe.train, [len(e.ids) for e in data.train]
    most = batches.most_documents(lengths, settings.batch, settings.max_tokens, shared=share)
    host.limit_code(ranks.device, most)  # before the first product
    place = lambda built: shard.shard(built, ranks.mesh, dtype, recipe.shard)  # noqa: E731
    built = model.build(recipe, data.config, data.tokenizer, data.scale, ranks.device, say, place, share=share)
    trained = built.trainable()
    count, whole = (sum(p.numel() for p in ps) for ps in (trained.values(), built.parameters()))
    say(
        f"model: {whole / 1e6:.1f}M parameters, {count / 1e6:.2f}M trained; compute {recipe.model.dtype}, "
        "masters float32"
    )
    built.train()
    total = batches.total_steps(
        len(data.train), batch=settings.batch, epochs=settings.epochs, max_steps=settings.max_steps
    )
    work = perf.work_of(built.blocks, built.head, data.config)
    peak, source = perf.peak_flops(ranks.device, recipe.run.peak_tflops)
    if work is None:
        say("mfu: not known for this architecture, whose blocks hold weights outside of linear layers")
    else:
        say(f"mfu: of {peak / 1e12:.0f} TFLOP/s a device ({source})" if peak else f"mfu: not shown ({source})")
    steps = feed.Feed(recipe, data.train, shared, ranks, work, total)
    return Job(recipe, ranks, data, built, optim.adamw(trained.values(), settings), total, shared, steps, work, peak)


def agreed(start: Path | None, run_dir: Path, ranks: Ranks) -> Path | None:
    """The main rank's ``start``: another node's view of the pointer may be older."""
    step = torch.tensor([-1 if start is None else checkpoint.progress(start).step])
    dist.broadcast(step, 0)
    return None if step.item() < 0 else checkpoint.folder(run_dir) / f"step_{step.item():06d}"


def restore(job: Job, start: Path | None, say: Callable[[str], None]) -> int:
    """Load the checkpoint ``start`` if there is one; returns how many steps are done."""
    if start is None:
        return 0
    progress = checkpoint.load(start, job.model, job.optimizer)
    if progress.fingerprint != job.data.fingerprint:
        raise UserError(
            f"data.train = {job.recipe.data.train} is not what {start} was trained on: choose another run.dir"
        )
    say(f"resume: going on after step {progress.step} from {start}")
    before = recipes.load(job.run_dir / "recipe.yaml", [])
    for changed in resume.announced(before, job.recipe):
        say(f"resume: {changed}")
    before, now = before.train, job.recipe.train
    if (before.max_steps, before.epochs) != (now.max_steps, now.epochs) and now.schedule != "constant":
        say(f"resume: the {now.schedule} schedule is now over {job.total} steps, so the learning rate jumps")
    return progress.step


def open_run_dir(job: Job, done: int) -> None:
    """Check that the disk can hold the checkpoints, then write the resolved recipe and what was left out."""
    size = 3 * sum(p.numel() * p.element_size() for p in job.model.trainable().values())
    # the next one is written before an older one goes
    there = len(checkpoint.written(checkpoint.folder(job.run_dir)))
    settings = job.recipe.checkpoint
    more = max(1, settings.keep_last + settings.keep_best + 1 - there) if done < job.total else 0
    free = shutil.disk_usage(job.run_dir).free
    if free < more * size:
        raise UserError(
            f"run.dir = {job.run_dir} has {free / 2**20:.0f} MiB free and needs {more * size / 2**20:.0f} MiB for "
            f"{more} more checkpoints (checkpoint.keep_last, keep_best and the one being written): free some space or "
            "choose another run.dir"
        )
    checkpoint.replace_file(job.run_dir / "recipe.yaml", recipes.dump(job.recipe))
    job.data.write_left_out(job.run_dir / "left_out.jsonl")
    log.keep_until(job.run_dir / "metrics.jsonl", done if done else -1)


def loop(job: Job, done: int) -> int:
    """Steps ``done`` to the end, with evaluations and checkpoints on the way; returns the exit code."""
    recipe, ranks = job.recipe, job.ranks
    names = recipe.train.trackers if ranks.is_main else ()
    trackers = [log.open_tracker(name, job.run_dir, recipes.as_dict(recipe), done) for name in names]
    with (
        StopSignal(loud=ranks.is_main) as stop,
        log.RunLog(job.run_dir, total=job.total, done=done, trackers=trackers, loud=ranks.is_main) as out,
        Saver(job.run_dir, recipe.checkpoint) as saver,
        perf.profiled(recipe.run.profile, done, job.run_dir / "profile", ranks.rank) as profile,
        memory.recorded(recipe.run.memory_snapshot, ranks.device, job.run_dir),
    ):
        # a stop leaves an evaluation that is due to the next start; the main rank's file decides for all
        seen = ranks.is_main and log.has_evaluation(job.run_dir / "metrics.jsonl", done)
        if not shard.all_sum(torch.tensor(float(seen), device=ranks.device)).item():
            stopping = evaluate_if_due(job, done, out, stop)
            if stopping:
                rest = "goes on from here" if done else "begins again: nothing was trained yet"
                out.say(f"stopped before step {done + 1}; the same command {rest}")
                return stopping
        if done >= job.total:
            out.say(f"nothing to do: {done} steps are done; raise train.max_steps or train.epochs to go on")
            return 0
        for step in range(done, job.total):
            with job.memory_watched(f"at step {step + 1}"):
                record = train_step(job, step, stop, unsaved=saver.failed)
            stopping, unsaved = record.pop("stop"), record.pop("unsaved")
            if profile:
                profile.step()
            out.step(record)
            if record.get("redone"):
                out.say(told_redone(record, recipe.loss.proposal))
            last = step + 1 == job.total
            if unsaved:
                settle(job, saver, out)
            if not stopping:
                stopping = evaluate_if_due(job, step + 1, out, stop)
            if last or stopping or (step + 1) % recipe.checkpoint.every == 0:
                save(job, saver, step + 1, out)
            if last or stopping:
                settle(job, saver, out, must=True)
            for line in saver.news():
                out.say(line)
            if stopping:
                out.say(f"stopped after step {step + 1} of {job.total}; the same command goes on from here")
                return stopping
        out.say(f"done: {job.total} steps in {job.run_dir}; to use the judge: tract-fast export {job.run_dir}")
    return 0


def evaluate_if_due(job: Job, done: int, out: log.RunLog, stop: StopSignal) -> int:
    """Held-out metrics before the first step, after the last, and every ``train.eval_every``. Returns the exit code
    where a signal to any rank has ended the evaluation, which is then due at the next start; else 0."""
    every = job.recipe.train.eval_every
    if not (job.data.held_out and (done in (0, job.total) or (every and done % every == 0))):
        return 0

    def stopping() -> bool:  # over gloo, which does not wait for what is queued on a GPU
        return shard.all_sum(torch.tensor(float(stop.received is not None))).item() > 0

    out.evaluating(len(job.data.held_out))
    what = job.model, job.data.held_out, job.recipe, job.ranks, job.sharing.share, stopping
    with job.memory_watched(f"in the evaluation after step {done}"):
        found = evaluate.held_out_metrics(*what)
    if found is None:
        return STOPPED[stop.received or signal.SIGTERM]
    out.evaluation(done, found)
    return 0


def save(job: Job, saver: Saver, step: int, out: log.RunLog) -> None:
    """Begin to write the checkpoint of ``step``, once the one before is whole."""
    settle(job, saver, out)
    settings, scores = job.recipe.checkpoint, {}
    if settings.keep_best and job.ranks.is_main:
        lines = log.read_metrics(job.run_dir / "metrics.jsonl")
        scores = {line["step"]: line["eval"][settings.metric] for line in lines if "eval" in line}
    progress = Progress(step=step, fingerprint=job.data.fingerprint, template=job.data.template)
    saver.start(job.model, job.optimizer, progress, scores)


def settle(job: Job, saver: Saver, out: log.RunLog, must: bool = False) -> None:
    """Wait for the checkpoint that is being written. Where it could not be (a full disk, no memory), what was saved
    before is whole: the run goes on or stops, as ``checkpoint.on_error`` says, and stops where it ``must`` be there.
    """
    try:
        saver.wait()
    except OSError as error:
        kept = checkpoint.latest(job.run_dir)
        rest = f"{kept.name} is whole" if kept else "nothing was saved before"
        if must or job.recipe.checkpoint.on_error == "fail":
            told = f"run.dir = {job.run_dir}: {error}; {rest}: make room and give the same command"
            raise RunStopped(told) from error
        out.say(f"warning: {error}; {rest}, and training goes on (checkpoint.on_error)")


def train_step(job: Job, step: int, stop: StopSignal, *, unsaved: bool = False) -> dict[str, Any]:
    """One optimizer step; returns its metrics, and whether any rank has got a signal or knows of an ``unsaved``
    checkpoint. Raises RunStopped before the update where something is not finite."""
    started = time.perf_counter()
    recipe = job.recipe
    with record_function("step: data"):
        taken = job.feed.take(step)
    waited = time.perf_counter() - started
    lr = optim.learning_rate(step, job.total, recipe.train)
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    of_rank = (taken.flops, float(stop.received is not None), float(unsaved))
    found, norm_of_gradient = forward_backward(job, step, taken, of_rank)
    of_proposal = {"redone": found["beyond"] > 0} if recipe.loss.proposal != "none" else {}
    if found["beyond"]:  # all ranks see the same sums; the draws of the second time have the same seeds
        weights = {name: found[name] for name in ("largest", "smallest")}
        job.optimizer.zero_grad()
        with job.model.head.without_proposal():
            found, norm_of_gradient = forward_backward(job, step, taken, of_rank)
        found |= weights
    if not (math.isfinite(found["loss"]) and math.isfinite(found["grad_norm"])):
        raise_not_finite(step, found["loss"], found["grad_norm"], taken.examples)
    if recipe.train.clip is not None:
        with record_function("step: clip"):
            shard.clip_gradients(list(job.model.trainable().values()), recipe.train.clip, norm_of_gradient)
    with record_function("step: optimizer"):
        job.optimizer.step()
        job.optimizer.zero_grad()
    job.model.head.weights_changed()
    seconds = time.perf_counter() - started
    # any rank's signal stops all, from the step on at which it was there; one that is alone need not agree with others
    stops = found["stopping"] or (job.ranks.world == 1 and stop.received is not None)
    return {
        "step": step + 1,
        **tally.record(found, recipe, taken.examples, lr),
        **of_proposal,
        "seconds": seconds,
        "waited": waited,
        **speed(job, found["flops"], seconds),
        "stop": STOPPED[stop.received or signal.SIGTERM] if stops else 0,
        "unsaved": found["unsaved"] > 0,
    }


def forward_backward(
    job: Job, step: int, taken: feed.Step, of_rank: tuple[float, ...]
) -> tuple[dict[str, float], Tensor]:
    """Gradients of a step; (its sums over all ranks by ``tally.NAMES``, ``grad_norm``, the ``largest`` weight of a
    proposal and minus its ``smallest`` effective share, the norm as a tensor)."""
    recipe, ranks = job.recipe, job.ranks
    seed_step(recipe.train.seed, step, ranks.rank)
    sums = torch.zeros(len(tally.NAMES), dtype=torch.float64, device=ranks.device)
    worst = sums.new_full((2,), -math.inf)  # filled on the device: numbers copied to it would wait for it
    for left, batch in zip(reversed(range(len(taken.micro_batches))), taken.micro_batches, strict=True):
        if recipe.lora.rank:  # adapters are small enough to hold their gradients until all can be reduced at once
            job.model.set_requires_gradient_sync(left == 0)
        batch = batch.to(ranks.device)
        with record_function("step: forward"):
            out = job.model(batch)
        out.loss.backward()
        parts, weights = tally.of_micro_batch(out, batch)
        sums[: len(parts)] += parts
        worst = torch.maximum(worst, weights)
    with record_function("step: clip"):
        norm = shard.gradient_norm(job.model.trainable().values())
    for i, value in enumerate(of_rank, start=len(tally.OF_MICRO_BATCH)):
        sums[i] = value
    shard.all_sum(sums)
    if recipe.loss.proposal != "none":
        shard.all_largest(worst)
    # the step's only transfer to the host; everything before it is queued on the device without waiting
    names = (*tally.NAMES, "grad_norm", "largest", "smallest")
    values = torch.cat([sums, norm.to(sums)[None], worst]).tolist()
    return dict(zip(names, values, strict=True)), norm


def speed(job: Job, flops: float, seconds: float) -> dict[str, float]:
    """TFLOP/s of each device, the share of its peak that this is (mfu), and peak memory in GiB, on the main rank."""
    found = {}
    if job.work:
        achieved = flops / seconds / job.ranks.world
        found = {"tflops": achieved / 1e12} | ({"mfu": achieved / job.peak} if job.peak else {})
    return found | {"memory": perf.peak_memory(job.ranks.device) / 2**30}


def told_redone(record: dict[str, Any], kind: str) -> str:
    return (
        f"step {record['step']} was computed again without loss.proposal = {kind}, which its logits do not suit "
        f"(largest weight {record['largest_weight']:.3g}, effective share {record['effective_share']:.2f}; at most "
        f"{proposal.LARGEST_WEIGHT:.0f}, at least {proposal.LEAST_SHARE}); where this repeats, write "
        "none: the run goes on"
    )


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout's random numbers are a function of (seed, step, rank): resuming needs no generator state."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))


def raise_not_finite(step: int, loss: float, grad_norm: float, examples: list[Encoded]) -> None:
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
    names = ", ".join(e.id for e in examples[:8]) + (" ..." if len(examples) > 8 else "")
    raise RunStopped(
        f"the {what} at step {step + 1}, before the update; its examples: {names}. Look at those examples, or start in "
        "another run.dir with a lower train.lr or train.clip"
    )
