"""The sections of a recipe: every setting of a run, its default, its meaning and what is refused.

The docstring below a field is its help text (``tract-fast train --help``) and its comment in a written recipe.
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from tract_fast.errors import UserError

# No `from __future__ import annotations` here: the fields' types are used as they stand.

LOWER_IS_BETTER = ("rmse", "mae", "ce")  # of checkpoint.metric
Fault = Literal["no_score", "truncated", "repeated", "length", "disagree"]  # of a rationale: see generate.py


def _require(holds: bool, key: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"{key} = {value}: {rule}")


def _check_choices(section: Any) -> None:
    """Hold every field whose type is a Literal, or a tuple of one, against its choices."""
    for f in fields(section):
        value, kind = getattr(section, f.name), f.type
        listed = get_origin(kind) is tuple
        kind = get_args(kind)[0] if listed else kind
        if get_origin(kind) is Literal:
            odd = [v for v in (value if listed else (value,)) if v not in get_args(kind)]
            key = f"{type(section).__name__.lower()}.{f.name}"
            _require(not odd, key, ", ".join(map(str, odd)), f"must be {' or '.join(get_args(kind))}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The pretrained model that is trained."""

    path: str
    """Folder, hub name (owner/name), or package:NAME for a model inside an installed Python package."""
    gguf_file: str | None = None
    """GGUF file inside path to read the weights from, dequantised."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the computation and of frozen weights; trained weights are float32 always."""
    attention: Literal["auto", "varlen", "sdpa", "flash_attention_2", "flash_attention_3"] = "auto"
    """Attention over packed sequences; auto takes the fastest that can run and says why."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    liger: Literal["auto", "off"] = "auto"
    """Liger's kernels for norm, RoPE and SwiGLU where they are installed."""
    lean: Literal["auto", "off"] = "auto"
    """RMSNorm and gated MLP keep less for backward and compute it again; auto where they are known and not compiled."""

    def __post_init__(self) -> None:
        _require(bool(self.path), "model.path", repr(self.path), "must name a folder or a hub model")
        reason = "training in float16 is refused, it needs loss scaling; use bfloat16"
        _require(self.dtype not in ("float16", "fp16", "half"), "model.dtype", self.dtype, reason)
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters; the authors' settings."""

    rank: int = 8
    """Rank of the adapters; 0 is full fine-tuning."""
    alpha: int = 16
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout on what the adapters read."""
    targets: str | tuple[str, ...] = "all-linear"
    """Modules that get an adapter: all-linear (the head never does), or names such as [q_proj, v_proj]."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "lora.rank", self.rank, "must be 0 (full fine-tuning) or more")
        _require(self.alpha > 0, "lora.alpha", self.alpha, "must be above 0")
        _require(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be at least 0 and below 1")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            # peft would take one name for a regular expression over whole paths
            object.__setattr__(self, "targets", tuple(name.strip() for name in self.targets.split(",")))
        named = bool(self.targets) and all(self.targets)
        _require(named, "lora.targets", list(self.targets), "must be all-linear or names of modules")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Judgements to learn from: a prompt, a rationale and a score each."""

    train: str
    """File (.jsonl, .json, .parquet), package:NAME/FILE inside an installed Python package, or hub name (:split)."""
    eval: str | None = None
    """Held-out examples, named like train."""
    holdout: float = 0.0
    """Share of train's questions that is held out for evaluation instead of eval."""
    limit: int | None = None
    """Train on the first so many examples only."""
    max_len: int = 3000
    """Longest example in tokens; longer ones are left out and listed, never cut."""
    max_dropped: float = 0.01
    """Share of examples that may be too long before the run is refused."""
    rationale: Literal["keep", "drop"] = "keep"
    """drop trains on the score alone, without a rationale before it."""
    share_prompts: Literal["auto", "off"] = "auto"
    """auto computes a prompt once for all its rationales in a micro-batch (on CUDA also a long head that prompts
    share): the same gradient for less work, with batches shuffled by prompt. off shuffles sequence by sequence."""
    on_error: Literal["fail", "skip"] = "fail"
    """What to do at a broken record: stop, or leave it out and list it."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options for the tokenizer's chat template, such as {enable_thinking: false}."""

    def __post_init__(self) -> None:
        _require(bool(self.train), "data.train", repr(self.train), "must name a file or a hub data set")
        _require(self.eval != "", "data.eval", repr(self.eval), "must name a file or a hub data set, or be null")
        _require(0 <= self.holdout < 1, "data.holdout", self.holdout, "must be at least 0 and below 1")
        both = self.eval is not None and self.holdout > 0
        _require(
            not both,
            "data.holdout",
            self.holdout,
            f"data.eval is {self.eval}; set one of the two only: data.holdout 0 or data.eval null",
        )
        _require(self.limit is None or self.limit > 0, "data.limit", self.limit, "must be above 0, or null")
        _require(self.max_len > 0, "data.max_len", self.max_len, "must be above 0")
        _require(0 <= self.max_dropped <= 1, "data.max_dropped", self.max_dropped, "must be a share from 0 to 1")
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The scale: what a judge writes as its score, and what it counts."""

    labels: tuple[str, ...] = ("1", "2", "3", "4", "5")
    """Scores as they are written; each must be one token."""
    values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    """The number that each label stands for."""

    def __post_init__(self) -> None:
        _require(len(self.labels) >= 2, "score.labels", list(self.labels), "must be two or more")
        _require(all(self.labels), "score.labels", list(self.labels), "an empty label cannot be written")
        odd = [label for label in self.labels if label != label.strip()]
        _require(not odd, "score.labels", odd, "must have no space around them: the score sentence has its own")
        _require(len(set(self.labels)) == len(self.labels), "score.labels", list(self.labels), "must all differ")
        digits = all(label.isdecimal() for label in self.labels)  # then they are meant as they read
        example = list(map(int, self.labels)) if digits else list(range(1, len(self.labels) + 1))
        rule = f"must be as many as score.labels ({len(self.labels)}), such as {example}"
        _require(len(self.values) == len(self.labels), "score.values", list(self.values), rule)
        _require(len(set(self.values)) == len(self.values), "score.values", list(self.values), "must all differ")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """ce_weight * cross-entropy + regression_weight * (expected score - true score)^2."""

    ce_weight: float = 1.0
    """Weight of the cross-entropy."""
    regression_weight: float = 1.0
    """The paper's lambda. The authors' code divides it by the batch twice: its effective value at batch 8 is 0.125."""
    normalize: Literal["scores", "vocab"] = "scores"
    """Probabilities of the labels: among the score tokens, or in the whole vocabulary (the paper)."""
    score_ce: bool = True
    """Whether the cross-entropy includes the score token (the paper's equation does, the authors' code does not)."""
    ce_reduction: Literal["token", "sequence"] = "token"
    """Mean over all trained tokens of a batch (the authors' code), or over its sequences' means."""
    gradient: Literal["exact", "sampled"] = "exact"
    """The gradient through the vocabulary: exact, or drawn at random around it (unbiased; cheaper on a CPU)."""
    eps: float | None = None
    """Of a sampled gradient: tokens of a probability below it are kept at random. null is 2^-10, .00098."""
    proposal: Literal["none", "int8", "fp8"] = "none"
    """Of a sampled gradient: draw on 8-bit logits (int8: CPUs with VNNI; fp8: Hopper), then correct."""
    implementation: Literal["auto", "chunked", "fused", "reference"] = "auto"
    """chunked (logits a chunk at a time), fused (none at all; CUDA), reference (plain PyTorch), auto (says why)."""

    def __post_init__(self) -> None:
        _require(self.ce_weight >= 0, "loss.ce_weight", self.ce_weight, "must be 0 or more")
        _require(self.regression_weight >= 0, "loss.regression_weight", self.regression_weight, "must be 0 or more")
        some = self.ce_weight > 0 or self.regression_weight > 0
        _require(some, "loss.ce_weight", self.ce_weight, "loss.regression_weight is 0 too: nothing would be learnt")
        _check_choices(self)
        sampled = self.gradient == "sampled"
        rule = "must be auto or chunked with loss.gradient: sampled"
        _require(
            not sampled or self.implementation in ("auto", "chunked"), "loss.implementation", self.implementation, rule
        )
        rule = "must be none without loss.gradient: sampled"
        _require(sampled or self.proposal == "none", "loss.proposal", self.proposal, rule)
        _require(sampled or self.eps is None, "loss.eps", self.eps, "must be null without loss.gradient: sampled")
        _require(
            self.eps is None or 2.0**-20 <= self.eps <= 1,
            "loss.eps",
            self.eps,
            "must be from 2^-20 (9.6e-7) to 1, or null",
        )


@dataclass(frozen=True, kw_only=True)
class Train:
    """Batches, optimizer (AdamW) and loop; the authors' settings where they give one."""

    batch: int = 8
    """Sequences per optimizer step, over all ranks and micro-batches."""
    max_tokens: int = 8192
    """Tokens packed into one micro-batch: sets memory, not the result. At least the longest example."""
    epochs: int = 2
    """Times that every example is seen."""
    max_steps: int | None = None
    """Optimizer steps, over as many epochs as that takes; null goes by epochs."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after warm-up; cosine and linear end near 0."""
    warmup: float = 0.1
    """Share of all steps in which the learning rate rises."""
    weight_decay: float = 0.0
    """AdamW's decay of matrices; vectors such as norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averages of gradient and squared gradient."""
    eps: float = 1e-8
    """AdamW's term in the denominator."""
    clip: float | None = 1.0
    """Largest norm of the gradient; null does not clip."""
    shuffle: bool = True
    """A new order of examples each epoch."""
    seed: int = 42
    """Of data order, held-out questions, adapters and dropout."""
    activation_checkpointing: str = "none"
    """Recompute activations to save memory: none, full, selective (keep matrix products), or k for every k-th block."""
    compile: bool = False
    """torch.compile each block."""
    eval_every: int | None = None
    """Steps between evaluations; null evaluates before the first and after the last step only."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Send metrics there too; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        for name in ("batch", "max_tokens", "epochs", "lr", "eps"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "must be above 0")
        for name in ("max_steps", "clip", "eval_every"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"train.{name}", value, "must be above 0, or null")
        _require(0 <= self.warmup <= 1, "train.warmup", self.warmup, "must be a share of all steps, from 0 to 1")
        _require(self.weight_decay >= 0, "train.weight_decay", self.weight_decay, "must be 0 or more")
        _require(all(0 <= b < 1 for b in self.betas), "train.betas", list(self.betas), "must be at least 0 and below 1")
        _require(0 <= self.seed < 2**63, "train.seed", self.seed, "must be 0 or more, and below 2**63")
        setting = self.activation_checkpointing
        known = setting in ("none", "full", "selective") or (setting.isdecimal() and int(setting) > 0)
        rule = "must be none, full, selective or a number of blocks such as 2"
        _require(known, "train.activation_checkpointing", setting, rule)
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is saved on the way, to go on from."""

    every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints that are kept besides because their metric is the best; only steps that are evaluated have one."""
    metric: Literal["pearson", "spearman", "kendall", "rmse", "mae", "ce"] = "rmse"
    """On held-out examples, of keep_best; of rmse, mae and ce the lowest is the best."""
    on_error: Literal["fail", "skip"] = "fail"
    """When one cannot be written, as on a full disk: stop the run, or go on without it (not without the last one)."""
    timeout: int = 7200
    """Seconds that ranks wait for the slowest of them to write, the last checkpoint included where a node is gone."""

    def __post_init__(self) -> None:
        _require(self.every > 0, "checkpoint.every", self.every, "must be above 0")
        _require(self.keep_last > 0, "checkpoint.keep_last", self.keep_last, "must be above 0")
        _require(self.keep_best >= 0, "checkpoint.keep_best", self.keep_best, "must be 0 or more")
        _require(self.timeout > 0, "checkpoint.timeout", self.timeout, "must be above 0")
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How the model is split over ranks (FSDP2); memory and speed only, not the result."""

    replicate: int = 1
    """Groups of ranks that each hold the whole model, sharded (HSDP), such as one a node; 1: one group (FSDP)."""
    reshard_after_forward: bool = True
    """Gather a block's weights again for backward; false keeps them from forward on: faster, more memory."""
    cpu_offload: bool = False
    """Keep weights, gradients and AdamW's state in host memory and run the optimizer there: slow, for lack of GPUs."""

    def __post_init__(self) -> None:
        _require(self.replicate > 0, "shard.replicate", self.replicate, "must be above 0")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How rationales are sampled; the authors' settings."""

    n: int = 1
    """Rationales per prompt; the score is the mean over them."""
    temperature: float = 1.0
    """Softens (above 1) or sharpens (below 1) the distribution of the next token; 0 always takes the likeliest."""
    top_p: float = 0.9
    """Sample among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.03
    """Divides the logits of tokens that stand in the prompt or the rationale so far."""
    max_new_tokens: int = 1024
    """Longest rationale with its score sentence, in tokens."""
    seed: int = 42
    """Of the samples; each prompt and draw has its own."""

    def __post_init__(self) -> None:
        for name in ("n", "max_new_tokens", "repetition_penalty"):
            _require(getattr(self, name) > 0, f"generate.{name}", getattr(self, name), "must be above 0")
        _require(self.temperature >= 0, "generate.temperature", self.temperature, "must be 0 or more")
        _require(0 < self.top_p <= 1, "generate.top_p", self.top_p, "must be above 0 and at most 1")
        _require(0 <= self.seed < 2**63, "generate.seed", self.seed, "must be 0 or more, and below 2**63")
        same = self.temperature == 0 and self.n > 1
        _require(not same, "generate.n", self.n, "must be 1 at temperature 0, where all rationales would be the same")


def sampling_of(settings: Sampling, **changes: Any) -> Sampling:
    """The settings of ``settings`` that decide samples, and nothing else of it."""
    return Sampling(**{f.name: getattr(settings, f.name) for f in fields(Sampling)} | changes)


@dataclass(frozen=True, kw_only=True)
class Generate(Sampling):
    """Rationales that the judge of the first stage writes for the second: sampling, and what is left out."""

    backend: str = "auto"
    """Where rationales are written: auto (here, by transformers), vllm (its server is started; arguments for it may
    follow), or the address of an OpenAI-compatible server that has the judge."""
    batch: int = 16
    """Sequences generated at a time."""
    drop: tuple[Fault, ...] = ()
    """Leave out rationales that lack the score sentence, are cut off, repeat themselves, are of odd length, or whose
    own score is far from the true one. The authors leave out none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.backend == "auto" or self.backend.split(" ")[0] == "vllm"
        known = known or self.backend.startswith(("http://", "https://"))
        _require(
            known, "generate.backend", self.backend, "must be auto, vllm or the address of a server, http://HOST:PORT"
        )
        rule = f"must be at least {self.n}, the rationales of one prompt (generate.n)"
        _require(self.batch >= self.n, "generate.batch", self.batch, rule)
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """The second stage of ``tract-fast run``: training on the rationales that the judge of the first wrote."""

    train: bool = True
    """Whether there is one; without it the judge of the first stage is the result."""
    start: Literal["seed", "stage1"] = "seed"
    """Start from the seed model again (the paper), or go on from the judge of the first stage."""
    rationales: Literal["own", "both"] = "own"
    """Train on the judge's own rationales, or on the annotated ones too."""

    def __post_init__(self) -> None:
        _check_choices(self)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How ``tract-fast run`` measures the judge at its end; rationales are sampled as by generate."""

    data: tuple[str, ...] = ()
    """Data sets, named like data.train; none: data.eval, or what data.holdout holds out."""
    n: int = 1
    """Rationales per prompt; the score is the mean over them."""
    batch: int = 16
    """Sequences generated at a time."""

    def __post_init__(self) -> None:
        _require(self.n > 0, "evaluate.n", self.n, "must be above 0")
        rule = f"must be at least {self.n}, the rationales of one prompt (evaluate.n)"
        _require(self.batch >= self.n, "evaluate.batch", self.batch, rule)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lives and how it starts."""

    dir: str
    """Folder for the run's metrics and checkpoints; a run that was stopped goes on from it."""
    nproc: int | Literal["auto"] = 1
    """Local processes, one a GPU; auto: as many as there are GPUs. Ranks that torchrun or Slurm started are joined."""
    max_restarts: int = 0
    """Times that processes started by nproc are started again from the last checkpoint after one of them died."""
    peak_tflops: float | None = None
    """TFLOP/s of one device at its best, for the share of it that is used (mfu); null knows common GPUs."""
    profile: int | None = None
    """Record two steps from this one on with torch.profiler, into run.dir/profile; null records nothing."""
    memory_snapshot: bool = False
    """Record every allocation on a GPU, written to run.dir at the end and when memory runs out."""
    timeout: int = 1800
    """Seconds that a rank waits for another one before the run ends."""
    resume: Literal["auto", "never"] = "auto"
    """Go on from the newest checkpoint in dir, or refuse a dir that holds one."""

    def __post_init__(self) -> None:
        _require(bool(self.dir), "run.dir", repr(self.dir), "must name a folder")
        if isinstance(self.nproc, str):
            _require(self.nproc == "auto", "run.nproc", self.nproc, "must be auto, or a number of processes above 0")
        else:
            _require(self.nproc > 0, "run.nproc", self.nproc, "must be above 0, or auto")
        for name in ("peak_tflops", "profile"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"run.{name}", value, "must be above 0, or null")
        _require(self.max_restarts >= 0, "run.max_restarts", self.max_restarts, "must be 0 or more")
        _require(self.timeout > 0, "run.timeout", self.timeout, "must be above 0")
        _check_choices(self)
