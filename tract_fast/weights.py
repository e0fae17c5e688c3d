"""Pretrained weights, read straight into a model that is sharded already.

The model is built without storage (on meta), sharded, and only then given memory, each rank its own rows; it reads them
from the safetensors files. Where the files do not have the model's names or shapes (GGUF, fused experts, other layouts)
rank 0 reads the whole model as transformers does and hands on one tensor at a time: slower, and said so.

What the files do not hold is made here: buffers, such as rotary frequencies, come from a small model of the same
configuration that is built with storage; adapters are drawn as peft draws them on one process, so that they do not
depend on the number of ranks.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from tract_fast.errors import UserError
from tract_fast.recipe import Lora, Model
from tract_fast.shards import Stored, part

Buffers = dict[str, Tensor]


def skeleton(settings: Model, config, dtype: torch.dtype, attention_name: str) -> nn.Module:
    """The causal LM of a configuration without storage."""
    with torch.device("meta"):
        return _from_config(settings, config, dtype, attention_name)


def small_twin(settings: Model, config, dtype: torch.dtype, attention_name: str, device: torch.device) -> nn.Module:
    """A random model of the same configuration with as few layers as have all its kinds (at least two), with storage.

    Its weights are large enough for every part to matter to the logits.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if kinds:
        text.layer_types = kinds[: text.num_hidden_layers]
    with torch.device(device):
        lm = _from_config(settings, config, dtype, attention_name)
    draw = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for p in lm.parameters():
            if p.ndim >= 2:
                p.normal_(std=p.shape[-1] ** -0.5, generator=draw)
    return lm.eval()


def _from_config(settings: Model, config, dtype: torch.dtype, attention_name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype, "attn_implementation": attention_name}
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), trust_remote_code=settings.trust_remote_code, **options
    )


def fill(
    lm: nn.Module,
    files: list[Path] | None,
    whole: Callable[[], nn.Module],
    buffers: Buffers,
    device: torch.device,
    say: Callable[[str], None],
    *,
    offload: bool = False,
) -> None:
    """Give ``lm``, sharded or not, storage on ``device`` and its pretrained weights; adapters are left undefined.

    ``files``: safetensors, or None where there are none; ``whole`` loads the model as transformers does, on the CPU; a
    tensor of ``buffers`` has the name that it has in ``lm``, or in one of its first layers. Buffers that have storage
    keep their values. With ``offload`` parameters are on the CPU, and buffers on ``device`` still.
    """
    kept = {name: b.detach().clone() for name, b in lm.named_buffers() if not b.is_meta}
    _give_storage(lm, torch.device("cpu") if offload else device)
    targets = {name.replace(".base_layer", ""): t for name, t in _tensors(lm) if name not in kept}
    stored, obstacle, damage = None, "there are no safetensors files", ""
    if files:
        try:
            stored = Stored(files)
            obstacle = _obstacle(stored, targets, buffers)
        except SafetensorError as error:
            damage = f"{files[0].parent}: a .safetensors file is damaged or cut short: {error}"
        except (ValueError, FileNotFoundError) as error:
            obstacle = str(error)
    # what one rank has met is so for all: the two ways of reading are not the same calls
    obstacle, damage = _of_any_rank(obstacle), _of_any_rank(damage)
    if damage:
        raise UserError(damage)
    if obstacle:
        say(f"weights: rank 0 reads the whole model ({obstacle})")
        _from_main(whole, targets)
    else:
        for name, tensor in targets.items():
            if name in stored.shapes:
                stored.fill(name, tensor)
            else:
                tensor.copy_(_buffer(buffers, name))
        say(f"weights: each rank reads its rows of {len(files)} safetensors file{'s' if len(files) > 1 else ''}")
    here = dict(lm.named_buffers())
    for name, value in kept.items():
        here[name].copy_(value)
    for module in lm.modules():
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, value.to(device))


def _of_any_rank(text: str) -> str:
    """What the first rank that has something to say does, on every rank; empty where none has."""
    if not dist.is_initialized():
        return text
    texts: list = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    rank, told = next(((rank, text) for rank, text in enumerate(texts) if text), (0, ""))
    return told if len(set(texts)) == 1 else f"rank {rank}: {told}"


def _give_storage(lm: nn.Module, device: torch.device) -> None:
    """``to_empty``, with tied parameters tied again: it makes one for each place."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in lm.modules():
        for name, p in module.named_parameters(recurse=False):
            places.setdefault(p, []).append((module, name))
    lm.to_empty(device=device)
    for (first, name), *others in places.values():
        for module, other in others:
            setattr(module, other, getattr(first, name))


def _tensors(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that pretrained weights give, each once."""
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        if ".lora_" not in name:
            yield name, tensor


def _obstacle(stored: Stored, targets: dict[str, Tensor], buffers: Buffers) -> str:
    """Why the files cannot be read by the model's own names; empty where they can."""
    for name, tensor in targets.items():
        if isinstance(tensor, nn.Parameter) or name in stored.shapes:
            if name not in stored.shapes:
                return f"the files have no {name}"
            if stored.shapes[name] != tuple(tensor.shape):
                return f"{name} is {stored.shapes[name]} in the files and {tuple(tensor.shape)} in the model"
        else:
            value = _buffer(buffers, name)
            if value is None or value.shape != tensor.shape:
                return f"the buffer {name} differs from layer to layer"
    return ""


def _buffer(buffers: Buffers, name: str) -> Tensor | None:
    """The small twin's buffer of a name; of a layer that it lacks: that of its layers, where they all have the same."""
    if name in buffers:
        return buffers[name]
    pattern = re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
    same = [value for other, value in buffers.items() if re.fullmatch(pattern, other)]
    return same[0] if same and all(torch.equal(same[0], value) for value in same[1:]) else None


def _from_main(whole: Callable[[], nn.Module], targets: dict[str, Tensor]) -> None:
    """Rank 0 loads the model and hands on one tensor at a time."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    main = world == 1 or dist.get_rank() == 0
    source = dict(_tensors(whole())) if main else {}
    with torch.no_grad():
        for name, tensor in targets.items():
            full = source.pop(name).detach() if main else torch.empty(tensor.shape, dtype=tensor.dtype)
            full = full.to(tensor.dtype).contiguous()
            if world > 1:
                dist.broadcast(full, 0)
            mine = part(tensor)
            rows = full[mine.start : mine.start + len(mine.local)] if full.ndim else full
            mine.local.copy_(rows)


def draw_adapters(lm: nn.Module, lora: Lora, seed: int) -> None:
    """Initialise the adapters of ``lm``, sharded or not, with the numbers that peft draws for a model on one process.

    peft makes two linear layers for each module in turn, which draw their weights, then draws A again and sets B to
    zero. Every rank draws all of them, which are few, and keeps its rows.
    """
    torch.manual_seed(seed)
    with torch.no_grad():
        for module in lm.modules():
            if not hasattr(module, "lora_A") or not len(module.lora_A):
                continue
            (name,) = module.lora_A
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            drawn = nn.Linear(a.shape[1], a.shape[0], bias=False).weight
            nn.Linear(b.shape[1], b.shape[0], bias=False)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
            mine = part(a)
            mine.local.copy_(drawn[mine.start : mine.start + len(mine.local)])
            part(b).local.zero_()
