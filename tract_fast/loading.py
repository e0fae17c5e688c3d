"""A judge's folder, opened: what it says of itself, its tokenizer and score scale, and, where asked for, its model.

No code of the folder runs, and of weights only safetensors and GGUF files are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tract_fast.data import prompt as prompts
from tract_fast.data.scores import ScoreScale, find_scale
from tract_fast.description import DESCRIPTION, Description, check_tokens, judge_folder, read_description
from tract_fast.errors import UserError
from tract_fast.host import limit_code
from tract_fast.model import DTYPES, load_config, load_lm, load_tokenizer, locate, round_to
from tract_fast.perf import slow_bfloat16
from tract_fast.recipe import Model, Score

Say = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A judge without its weights."""

    path: str  # as it was given
    folder: Path | None  # with tract.json; None: any instruct model
    about: Description
    adapter: Path | None
    source: str  # where the (base) model's weights and configuration are
    config: Any
    tokenizer: Any
    scale: ScoreScale


def open_judge(path: str, say: Say) -> Opened:
    """Read all but the weights. Raises UserError where the path is no model, or its ``tract.json`` does not belong to
    its tokenizer."""
    folder = judge_folder(path)
    about = read_description(folder / DESCRIPTION) if folder else None
    if about is None:
        locate(Model(path=path))  # there is such a folder or package, or it can be a hub name
        say(f"{path} has no {DESCRIPTION}: taken as a judge that gives scores {', '.join(Score.labels)}")
    found = about or Description()
    adapter = folder if folder and (folder / "adapter_config.json").is_file() else None
    source = found.base_model if adapter else str(folder or path)
    if adapter and not source:
        raise UserError(f"{adapter / DESCRIPTION} names no base_model for the adapter: use the merged folder")
    config = load_config(Model(path=source))
    tokenizer = load_tokenizer(Model(path=str(adapter) if adapter else source))
    scale = find_scale(tokenizer, found.labels, found.values, rationale=found.rationale)
    if about:
        check_tokens(folder / DESCRIPTION, about, scale)
    prompts.check_tokenizer(tokenizer, scale, found.chat_template_kwargs or {})
    return Opened(path, folder, found, adapter, source, config, tokenizer, scale)


def load_weights(opened: Opened, dtype: str, device: torch.device, say: Say) -> nn.Module:
    """The judge's model on ``device``, its adapter merged. Raises UserError where it is none that can be read."""
    limit_code(device)
    chosen, reason = choose_dtype(dtype, opened.about.dtype, device)
    say(f"dtype: {chosen} ({reason})")
    caps = getattr(opened.config.get_text_config(), "attn_logit_softcapping", None)
    model = Model(path=opened.source, dtype=chosen)
    lm = load_lm(model, dtype=DTYPES[chosen], attention_name="eager" if caps else "sdpa", config=opened.config)
    if getattr(lm, "_is_stateful", False):
        kind = lm.config.model_type
        raise UserError(f"{opened.path}: {kind} keeps a state instead of a key-value cache, which is not read")
    if opened.adapter:
        lm = _merged(lm, opened.adapter)
    return lm.to(device)


def choose_dtype(asked: str, trained: str, device: torch.device) -> tuple[str, str]:
    """(dtype to compute in, reason). Raises UserError where ``asked`` is none."""
    if asked != "auto":
        if asked not in DTYPES:
            raise UserError(f"dtype = {asked}: must be auto, {' or '.join(DTYPES)}")
        return asked, "asked for"
    if trained == "bfloat16" and slow_bfloat16(device):
        return "float32", "this CPU has no fast bfloat16 products"
    return trained, "as it was trained"


def _merged(lm: nn.Module, adapter: Path) -> nn.Module:
    """``lm`` with the adapter merged in float32 and rounded to its own dtype, as ``export`` does."""
    from peft import PeftModel

    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{adapter} has no adapter_model.safetensors: other forms of weights are not read")
    dtype = lm.dtype
    try:
        return round_to(PeftModel.from_pretrained(lm.float(), str(adapter)).merge_and_unload(), dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{adapter}: the adapter does not fit its base model: {reason}") from error
