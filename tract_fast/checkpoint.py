"""What a checkpoint is, resuming from it, and export.

A checkpoint is a folder ``run.dir/checkpoints/step_000500`` with what was trained and AdamW's state as safetensors, a
file of rows per rank (``shards``), so that any number of ranks can read it, and ``state.json``. Nothing in it is
unpickled. ``saver`` writes it under a temporary name and renames it when complete; ``latest`` is replaced last: killed
at any instant, the previous checkpoint is whole.

Random numbers need no state: each step seeds its generator from (seed, step, rank), and the data order is arithmetic.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from tract_fast import quick_gguf, recipe as recipes
from tract_fast.data import prompt
from tract_fast.data.scores import SENTENCE, ScoreScale, find_scale
from tract_fast.errors import UserError
from tract_fast.model import DTYPES, TractModel, load_lm, load_tokenizer, lora_config, round_to
from tract_fast.recipe import Recipe
from tract_fast.shards import Stored

EXPORT_WARNINGS = (  # of libraries, about what is meant to be so
    "Could not find a config file",  # a GGUF file carries its own
    "`is_gradient_checkpointing` is deprecated",  # peft still asks for it
)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """Where a run stands: ``step`` optimizer steps are done, on data with this fingerprint, which has the prompts of
    the Feedback Collection (``prompt.TEMPLATE``) or others."""

    step: int
    fingerprint: str
    template: bool


def folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None. Raises UserError where the pointer leads nowhere."""
    pointer = folder(run_dir) / "latest"
    if not pointer.exists():
        return None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    there = {p.name: p for p in written(folder(run_dir)) if (p / "state.json").is_file()}
    if name not in there:
        names = ", ".join(sorted(there)) or "none is left"
        raise UserError(
            f"{pointer} says {name[:60]!r}, which is not there: write the name of a complete checkpoint in it: {names}"
        )
    return there[name]


def make_folder(path: Path, setting: str) -> None:
    """Make ``path`` and try to write into it. Raises UserError, naming the setting, before work is lost."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{setting} = {path} cannot be written: {error.strerror}; choose another") from error


@contextlib.contextmanager
def made_folder(path: Path, setting: str) -> Iterator[None]:
    """``make_folder``, which goes again at the end where it was not there before and nothing came to be in it: a start
    that is refused leaves none."""
    new = not path.exists()
    make_folder(path, setting)
    try:
        yield
    finally:
        if new:
            with contextlib.suppress(OSError):  # not empty, or another rank was first
                path.rmdir()


@contextlib.contextmanager
def locked(path: Path, setting: str) -> Iterator[None]:
    """Hold a folder for this process. Raises UserError where another has it: both would write the same files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{setting} = {path} is being written by another process: wait for it, or choose another"
            ) from None
        yield
    finally:
        os.close(handle)


def written(checkpoints: Path) -> list[Path]:
    """The checkpoints in their folder; what does not have exactly such a name is the user's."""
    return [p for p in checkpoints.iterdir() if re.fullmatch(r"step_\d{6,}", p.name)] if checkpoints.is_dir() else []


def replace_file(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, whole and on disk."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            make_readable(Path(name))
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
    flush(path.parent)


def make_readable(path: Path) -> None:
    """The mode of a new file; those of ``tempfile`` and of safetensors are their owner's alone."""
    path.chmod(_new_file_mode())


@functools.cache  # the only way to read it sets it for a moment, which threads must not do
def _new_file_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def flush(path: Path) -> None:
    """Make a folder's or file's change survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def training_state(model: TractModel, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their AdamW state as one flat dictionary; state that does not exist yet is made of zeros.

    The tensors are the live ones: loading into them restores the run. Raises RuntimeError where a parameter is not the
    optimizer's own: one that FSDP has gathered is a copy of it in another dtype.
    """
    flat: dict[str, Tensor] = {}
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.trainable().items():
        if id(p) not in owned:
            raise RuntimeError(f"{name} is gathered: reshard the model before its state is read")
        state = optimizer.state[p]
        if not state:
            zero = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {"step": zero, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        flat[f"model.{name}"] = p.data
        flat |= {f"optimizer.{name}.{key}": state[key] for key in MOMENTS}
    return flat


def one_line(error: BaseException) -> str:
    """An error's text, short enough for a message."""
    return " ".join(str(error).split())[:300]


def load(path: Path, model: TractModel, optimizer: torch.optim.Optimizer) -> Progress:
    """Restore parameters and optimizer state in place from a checkpoint of this run; returns where it stood.

    Every rank reads the rows that it holds, whatever number of ranks wrote them. Raises UserError where it is damaged.
    """
    stored = _stored(path)
    try:
        for name, tensor in training_state(model, optimizer).items():
            stored.fill(name, tensor)
            _check_finite(name, tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    except (ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return progress(path)


def progress(path: Path) -> Progress:
    """Where the run stood at a checkpoint."""
    saved = _state(path)
    kinds = {"step": int, "fingerprint": str, "template": bool}
    lacking = [name for name in kinds if name not in saved]
    if lacking:
        raise UserError(f"{path / 'state.json'} lacks {', '.join(lacking)}: another version of tract_fast wrote it")
    odd = [f"{name} is {saved[name]!r}" for name, kind in kinds.items() if type(saved[name]) is not kind]
    if odd or path.name != f"step_{saved['step']:06d}":  # its name is how other ranks find it
        raise _damaged(path, f"state.json: {', '.join(odd) or 'it is of another step'}")
    return Progress(**{name: saved[name] for name in kinds})


def _state(path: Path) -> dict[str, Any]:
    """What ``state.json`` says. Raises UserError where it is damaged."""
    try:
        found = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, f"state.json: {one_line(error)}") from error
    return found if isinstance(found, dict) else {}


def _stored(path: Path) -> Stored:
    """What a checkpoint holds. Raises UserError where it is damaged."""
    world = _state(path).get("world")
    files = sorted(path.glob("rank_*.safetensors"))
    if len(files) != world:
        raise _damaged(path, f"{world} ranks wrote it and it has {len(files)} files")
    try:
        stored = Stored(files)
    except (ValueError, SafetensorError) as error:
        raise _damaged(path, error) from error
    odd = [f"{name} is {dtype}" for name, dtype in stored.dtypes.items() if dtype != "F32"]
    if odd:
        raise _damaged(path, f"{odd[0]} and not float32")
    return stored


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError where a tensor has a NaN or an infinity, which would be blamed on the data."""
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{name} has values that are not finite")


def _damaged(path: Path, error: BaseException | str) -> UserError:
    others = sorted(p.name for p in written(path.parent) if p != path and (p / "state.json").is_file())
    return UserError(
        f"{path} is damaged ({one_line(error)}): write the name of an earlier checkpoint into "
        f"{path.parent / 'latest'}: {', '.join(others) or 'none is left'}"
    )


def export(run_dir: Path, out: Path | None = None, step: int | None = None) -> Path:
    """Turn a run's checkpoint (the newest, or that of ``step``) into folders that plain transformers and peft load.

    Full fine-tuning: ``out`` is a Hugging Face folder. LoRA: ``out/adapter`` is a PEFT adapter and ``out/merged`` a
    Hugging Face folder with the adapter merged in. Each has the tokenizer and ``tract.json`` (score labels, token ids,
    values, normalisation, prompt template). Weights are written in ``model.dtype``, the adapter in float32. Default
    ``out``: ``run_dir/judge``. Can be repeated. Raises UserError where the run holds no such checkpoint.
    """
    run_dir, out = Path(run_dir), Path(out) if out else Path(run_dir) / "judge"
    source = latest(run_dir) if step is None else folder(run_dir) / f"step_{step:06d}"
    if source is None or not (source / "state.json").is_file():
        raise UserError(f"{run_dir} holds no checkpoint{f' of step {step}' if step is not None else ''} to export")
    make_folder(out, "--out")
    with warnings.catch_warnings():
        for harmless in EXPORT_WARNINGS:
            warnings.filterwarnings("ignore", message=harmless)
        _write_judge(run_dir, source, out)
    return out


@quick_gguf.kept()
def _write_judge(run_dir: Path, source: Path, out: Path) -> None:
    recipe = recipes.load(run_dir / "recipe.yaml", [])
    tokenizer = load_tokenizer(recipe.model)
    scale = find_scale(tokenizer, recipe.score.labels, recipe.score.values, rationale=recipe.data.rationale)
    description = json.dumps(describe(recipe, scale, progress(source)), indent=2, ensure_ascii=False) + "\n"
    dtype = DTYPES[recipe.model.dtype]
    lm = load_lm(recipe.model, dtype=torch.float32, attention_name="eager")  # every family has it
    weights = trained_weights(source)
    if recipe.lora.rank:
        # text as a judge reads it: control tokens, say, may have weights that were never trained
        probe = torch.tensor([tokenizer(f"{prompt.TEMPLATE[:300]} {SENTENCE} ")["input_ids"]])
        folders = _export_lora(lm, recipe, weights, dtype, out, probe)
    else:
        missing = _load_weights(lm, weights)
        if missing:
            raise UserError(f"{source} lacks {len(missing)} trained weights, such as {sorted(missing)[0]}")
        round_to(lm, dtype).save_pretrained(out)
        folders = [out]
    for target in folders:
        tokenizer.save_pretrained(target)
        (target / "tract.json").write_text(description, encoding="utf-8")
        for file in target.glob("*.safetensors"):
            make_readable(file)


def trained_weights(source: Path) -> dict[str, Tensor]:
    """The trained parameters of a checkpoint, whole, on the CPU."""
    stored, found = _stored(source), {}
    try:
        for name in stored.shapes:
            if name.startswith("model."):
                found[name.removeprefix("model.")] = stored.whole(name)
                _check_finite(name, found[name.removeprefix("model.")])
    except (ValueError, SafetensorError) as error:
        raise _damaged(source, error) from error
    return found


def _load_weights(lm, weights: dict[str, Tensor]) -> set[str]:
    """Copy ``weights`` into the model by name; returns the names of trained parameters that were not given. Raises
    UserError where one is not the model's."""
    parameters = dict(lm.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise UserError(f"the checkpoint is damaged: its {name} {tuple(value.shape)} is none of the model's")
            parameters[name].copy_(value)
    return {name for name, p in parameters.items() if p.requires_grad} - set(weights)


def _export_lora(
    lm, recipe: Recipe, weights: dict[str, Tensor], dtype: torch.dtype, out: Path, probe: Tensor
) -> list[Path]:
    """Write the adapter, merge it in float32, write the merged model, and say how far their logits are apart."""
    from peft import get_peft_model

    if not any(value.any() for name, value in weights.items() if "lora_B" in name):
        raise UserError("every lora_B is zero: this checkpoint has learnt nothing, or was not written whole")
    base = round_to(round_to(lm, dtype), torch.float32)  # merged in float32, from the base as it was trained
    adapted = get_peft_model(base, lora_config(recipe.lora))
    missing = _load_weights(adapted.base_model.model, weights)
    if missing:
        raise UserError(f"the checkpoint lacks {len(missing)} adapter weights, such as {sorted(missing)[0]}")
    adapted.save_pretrained(out / "adapter")
    adapted.eval()
    with torch.no_grad():
        before = adapted(probe).logits
        merged = round_to(adapted.merge_and_unload(), dtype)
        after = merged(probe).logits.float()
    error = ((after - before).norm() / before.norm()).item()
    print(f"merged and written in {recipe.model.dtype}: logits on a text differ by {error:.1e} (relative)")
    if recipe.model.gguf_file or recipe.model.path.startswith("package:"):
        print("the adapter's base is a GGUF file: load that with gguf_file=..., or use the merged folder")
    merged.save_pretrained(out / "merged")
    return [out / "adapter", out / "merged"]


def describe(recipe: Recipe, scale: ScoreScale, progress: Progress) -> dict:
    """``tract.json``: what a judge needs besides its weights. ``prompt_template`` is null where prompts were the data's
    own."""
    return {
        "format": 1,
        "labels": list(scale.labels),
        "values": list(scale.values),
        "token_ids": list(scale.token_ids),
        "prefix_ids": list(scale.prefix_ids),
        "normalize": recipe.loss.normalize,
        "rationale": recipe.data.rationale,
        "chat_template_kwargs": recipe.data.chat_template_kwargs,
        "prompt_template": prompt.TEMPLATE if progress.template else None,
        "score_sentence": SENTENCE,
        "base_model": recipe.model.path,
        "dtype": recipe.model.dtype,
    }
