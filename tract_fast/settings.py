"""Settings as YAML: a file or a word of the command line becomes nodes, a node a typed value, a value text again.

Nodes are read by the type of their setting and not by YAML 1.1's guesses, so ``1e-5`` is a number where one belongs,
``off`` and ``1`` are text where text belongs, and every mistake is named with its line.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import inspect
import itertools
import math
import re
import sys
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from tract_fast.errors import UserError

TAG = "tag:yaml.org,2002:"
BASIC = {  # type: (how help names it, how an error names it)
    str: ("TEXT", "text"),
    int: ("INT", "a whole number"),
    float: ("NUMBER", "a number"),
    bool: ("true|false", "true or false"),
    types.NoneType: ("null", "null"),
}
# Other trainers' names (HF Trainer, TRL, LLaMA-Factory, axolotl, torchtune) for what a setting here does
OTHER_NAMES = {
    "model.path": "model model_name model_name_or_path pretrained_model_name_or_path base_model checkpoint_dir",
    "model.dtype": "torch_dtype bf16 bfloat16 compute_dtype precision",
    "model.attention": "attn_implementation flash_attn flash_attention sdp_attention use_flash_attention_2",
    "model.liger": "use_liger use_liger_kernel enable_liger_kernel",
    "lora.rank": "r lora_r lora_rank",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_target target_modules lora_target_modules lora_target_linear lora_attn_modules",
    "data.train": "dataset datasets dataset_name dataset_path data_path data_files train_file train_data train_dataset",
    "data.eval": "eval_dataset validation_file eval_file validation_data test_datasets",
    "data.holdout": "val_size val_set_size test_size validation_split",
    "data.limit": "max_samples max_train_samples",
    "data.max_len": "max_length max_seq_length max_seq_len cutoff_len sequence_len model_max_length block_size",
    "loss.regression_weight": "lambda lambda_ reg_weight mse_weight",
    "train.batch": "batch_size per_device_train_batch_size micro_batch_size train_batch_size global_batch_size",
    "train.epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "train.max_steps": "num_steps total_steps max_iters max_steps_per_epoch",
    "train.lr": "learning_rate peak_lr",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "train.eps": "adam_epsilon epsilon",
    "train.clip": "max_grad_norm gradient_clipping grad_clip clip_grad_norm gradient_clip_val",
    "train.seed": "data_seed random_seed",
    "train.activation_checkpointing": "gradient_checkpointing enable_activation_checkpointing",
    "train.compile": "torch_compile",
    "train.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch run_val_every_n_steps",
    "train.trackers": "report_to log_with wandb_project use_wandb use_tensorboard metric_logger logger",
    "checkpoint.every": "save_steps save_strategy saves_per_epoch save_every_n_steps",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.keep_best": "load_best_model_at_end save_top_k",
    "checkpoint.metric": "metric_for_best_model monitor greater_is_better",
    "shard.replicate": "dp_replicate_size replicas hsdp",
    "shard.reshard_after_forward": "fsdp_reshard_after_forward sharding_strategy",
    "shard.cpu_offload": "offload_params fsdp_offload_params offload",
    "run.dir": "output_dir out_dir logging_dir run_name",
    "run.nproc": "nproc_per_node num_processes num_gpus world_size",
    "run.resume": "resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir",
}
NO_SETTING = {  # names of settings that are not needed or not there: what to do instead
    "fp16 float16 half": "float16 needs loss scaling, which is not there; model.dtype is bfloat16 or float32",
    "gradient_accumulation_steps": "train.batch is the whole step's; micro-batches are packed up to train.max_tokens",
    "warmup_steps num_warmup_steps warmup_ratio": "write train.warmup, a share of all steps such as 0.1",
    "logging_steps logging_strategy log_every_n_steps": "leave it out; every step is logged in run.dir/metrics.jsonl",
    "packing sample_packing neat_packing padding_free group_by_length": "leave it out; sequences are always packed",
    "template chat_template": "the tokenizer's own is used; its options go to data.chat_template_kwargs",
    "optim optimizer": "the optimizer is AdamW, set by train.betas, train.eps and train.weight_decay",
    "load_in_4bit load_in_8bit quantization_bit": "not in this version: base weights are bfloat16 or float32",
    "finetuning_type adapter use_peft peft": "lora.rank above 0 trains an adapter, lora.rank: 0 every weight",
    "deepspeed fsdp fsdp_config": "leave it out; the loop shards by itself, as the section shard says",
    "eval_batch_size per_device_eval_batch_size": "leave it out; evaluation is packed up to train.max_tokens too",
    "train_on_inputs completion_only_loss assistant_only_loss": "leave it out; prompts are never trained on",
    "stage do_train do_eval": "leave it out",
}
UNIONS = (types.UnionType, Union)  # int | None, and int | Literal["auto"]
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Given(NamedTuple):
    """One setting as the user wrote it; ``where`` is `` (file:line)``, or empty on the command line."""

    node: Node
    text: str
    where: str


class _Loader(yaml.SafeLoader):
    """Safe YAML with the few untyped words of YAML 1.2, and no aliases: a setting stands where it is written."""

    yaml_implicit_resolvers: ClassVar = {}

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not supported, write the value", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> ScalarNode:
        return self.represent_scalar(TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)

for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(TAG + "null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
    _class.add_implicit_resolver(TAG + "bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    _class.add_implicit_resolver(TAG + "int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
    _class.add_implicit_resolver(
        TAG + "float",
        re.compile(r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf)$|\.nan$"),
        list("-+0123456789."),
    )


def read_file(path: Path, sections: Collection[str], above: tuple[Path, ...] = ()) -> dict[str, Given]:
    """Settings of a YAML file by dotted name (``train.lr``). An empty section holds none.

    ``base: FILE`` (relative to the file) takes the settings of another one where this one has none; ``above`` are the
    files that lead here. Raises UserError, with file and line, where a file is not there or not such a file, or is its
    own base; names are not checked.
    """
    if path.resolve() in above:
        raise UserError(f"{path} is its own base")
    source = _read_text(path)
    root = _compose(source, f"{path}", lambda line: f"{path}:{line}")
    if root is None or _is_null(root):
        raise UserError(f"{path} is empty: a recipe needs at least model.path, data.train and run.dir")
    if not isinstance(root, MappingNode):
        raise UserError(f"{path} holds no settings: a recipe is a mapping of sections such as `train: {{lr: 1e-5}}`")
    found: dict[str, Given] = {}
    base: dict[str, Given] = {}
    for name, section in root.value:
        if name.value == "base" and isinstance(section, ScalarNode):
            try:
                base = read_file(path.parent / section.value, sections, (*above, path.resolve()))
            except UserError as error:
                raise UserError(f"base ({path}:{name.start_mark.line + 1}): {error}") from None
            continue
        if isinstance(section, MappingNode) and "." not in name.value and (section.value or name.value in sections):
            members = [(f"{name.value}.{key.value}", key, node) for key, node in section.value]
        elif name.value not in sections:
            members = [(name.value, name, section)]
        elif _is_null(section):
            members = []
        else:
            where = f"{path}:{name.start_mark.line + 1}"
            raise UserError(f"{name.value} ({where}) is a section: write its settings indented below it")
        for key, word, node in members:
            where = f" ({path}:{word.start_mark.line + 1})"
            if key in found:
                raise UserError(f"{key} stands twice:{found[key].where} and{where}")
            found[key] = Given(node, _shown(source, node), where)
    return base | found


def read_word(key: str, text: str) -> Given:
    """The value of ``--key`` on the command line, read as a YAML value. Raises UserError."""
    node = _compose(text, f"--{key} {text}", lambda line: f"--{key} {text}")
    if node is None:
        node = ScalarNode(TAG + "null", "")
    elif text[node.end_mark.index :].strip():
        rest = text[node.end_mark.index :].strip()
        raise UserError(f"--{key} {text}: as YAML {rest!r} is no part of the value: quote it, --{key} '\"...\"'")
    return Given(node, text or "null", "")


def _read_text(path: Path) -> str:
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise UserError(f"{path} is a folder" + (f"; did you mean {inside}?" if inside.is_file() else ", not a recipe"))
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise UserError(f"{path}: no such recipe file{hint}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _compose(source: str, name: str, where: Any) -> Node | None:
    """The node graph of one YAML document; ``where(line)`` names a place in it."""
    try:
        loader = _Loader(source)
        try:
            root = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        hint = " (YAML is indented with spaces, not tabs)" if "'\\t'" in (error.problem or "") else ""
        raise UserError(f"{where(mark.line + 1)}: not valid YAML: {error.problem}{hint}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{name}: not valid YAML: nested too deeply") from None
    if root is not None:
        _check_node(root, where)
    return root


def _check_node(node: Node, where: Any) -> None:
    """Refuse what loading would hide or run: names that stand twice, names that are no words, tags."""
    line = node.start_mark.line + 1
    if node.tag not in {TAG + kind for kind in ("str", "int", "float", "bool", "null", "seq", "map")}:
        raise UserError(f"{where(line)}: the tag {node.tag.replace(TAG, '!!')} is not supported: write the plain value")
    if isinstance(node, SequenceNode):
        for item in node.value:
            _check_node(item, where)
    if isinstance(node, MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, ScalarNode):
                raise UserError(f"{where(line)}: the name of a setting must be a word")
            if key.value in lines:
                raise UserError(f"{where(line)}: {key.value} stands twice, first in line {lines[key.value]}")
            lines[key.value] = line
            _check_node(value, where)


def _shown(source: str, node: Node) -> str:
    text = " ".join(source[node.start_mark.index : node.end_mark.index].split())
    return (text if len(text) <= 60 else text[:57] + "...") or "null"


def _is_null(node: Node) -> bool:
    """Whether null stands there: empty, ~, null, or Python's None."""
    plain = isinstance(node, ScalarNode) and node.style is None
    return plain and (node.tag == TAG + "null" or node.value.lower() == "none")


class _Mismatch(Exception):
    """A node that is not of the type asked for."""


def typed(key: str, given: Given, kind: Any) -> Any:
    """The value of type ``kind`` that ``given`` holds. Raises UserError that says what ``key`` must be.

    Kinds: str, int, float, bool, Literal (any word: its section checks it), tuple, ``dict[str, Any]``, and unions.
    """
    try:
        return _convert(given.node, kind)
    except _Mismatch:
        raise UserError(f"{key} = {given.text}: must be {_expected(kind)}") from None


def _convert(node: Node, kind: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in UNIONS:
        if types.NoneType in args and _is_null(node):
            return None
        for option in args:
            with contextlib.suppress(_Mismatch):
                return _convert(node, option)
    elif origin is tuple and isinstance(node, SequenceNode):
        kinds = args[:1] * len(node.value) if args[-1] is Ellipsis else args
        if len(kinds) == len(node.value):
            return tuple(_convert(item, k) for item, k in zip(node.value, kinds, strict=True))
    elif origin is dict and isinstance(node, MappingNode):
        return {key.value: _Loader("").construct_document(value) for key, value in node.value}
    elif isinstance(node, ScalarNode):
        if (kind is str or origin is Literal) and node.tag != TAG + "null":
            return node.value
        if kind is bool and node.value.lower() in BOOLEANS:
            return BOOLEANS[node.value.lower()]
        if kind in (int, float):
            return _number(node.value, kind)
    raise _Mismatch


def _number(text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        raise _Mismatch from None
    if not math.isfinite(value):
        raise _Mismatch
    return value


def _expected(kind: Any) -> str:
    """What an error says a setting must be."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(args)
    if origin in UNIONS:
        return " or ".join(_expected(a) for a in args)
    if origin is tuple:
        if args[-1] is not Ellipsis:
            return f"a list of {len(args)} values in brackets"
        words = get_args(args[0]) or (("1", "2") if args[0] is float else ("A", "B"))
        return f"a list such as [{', '.join(words[:2])}]"
    return "a mapping such as {name: value}" if origin is dict else BASIC[kind][1]


def metavar(kind: Any) -> str:
    """How help names the values of a type: ``INT|null``."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(args)
    if origin in UNIONS:
        return "|".join(metavar(a) for a in args)
    if origin is tuple:
        return f"[{', '.join('...' if a is Ellipsis else metavar(a) for a in args)}]"
    return "{NAME: VALUE}" if origin is dict else BASIC[kind][0]


def as_text(value: Any, kind: Any) -> str:
    """``value`` as one line of YAML that reads back as itself where a ``kind`` belongs."""

    def written(style: str | None) -> str:
        options = {"default_flow_style": True, "width": math.inf, "allow_unicode": True, "sort_keys": False}
        text = yaml.dump(value, Dumper=_Dumper, default_style=style, **options)
        return text.removesuffix("...\n").removesuffix("\n")  # "..." ends a document that is one bare word

    text = written(None)
    # "none" and the like: a word for text in YAML, but for null where null may stand
    return written('"') if isinstance(value, str) and _convert(_Loader(text).get_single_node(), kind) != value else text


def unknown(key: str, known: Collection[str]) -> str:
    """What is wrong with a dotted name that is not ``known``, and which one was probably meant."""
    section, _, last = key.lower().replace("-", "_").rpartition(".")
    for names, sentence in NO_SETTING.items():
        if last in names.split():
            return f"no such setting: {sentence}"
    inside = [k for k in known if key.startswith(f"{k}.")]
    if inside:
        return f"{inside[0]} is one value: write {inside[0]}: {{{key.removeprefix(inside[0] + '.')}: ...}}"
    members = [k for k in known if k.startswith(f"{key}.")]
    if members:
        return f"this is a section: name one of its settings, such as {members[0]}"
    meant = [k for k, names in OTHER_NAMES.items() if last in names.split()]
    meant = meant or [k for k in known if k.rpartition(".")[2] == last]
    if not (meant or section) and (near := difflib.get_close_matches(last, {k.partition(".")[0] for k in known}, n=1)):
        return f"no such section; did you mean {near[0]}?"
    worded = [k for k in known if last in k.rpartition(".")[2].split("_")]  # steps: max_steps
    meant = meant or [k for k in worded if k.startswith(f"{section}.")] or worded
    meant = meant or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    meant = meant or [k for k in known if difflib.get_close_matches(last, [k.rpartition(".")[2]], cutoff=0.75)][:1]
    return "no such setting" + (f"; did you mean {' or '.join(meant)}?" if meant else "")


def docs(section: type) -> Mapping[str, str]:
    """The docstring below each field of a dataclass and its bases, by name, as one line each."""
    return {
        field.target.id: " ".join(doc.value.value.split())
        for cls in section.__mro__[:-1]
        for field, doc in itertools.pairwise(_class_bodies(cls.__module__)[cls.__name__])
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
    }


@functools.cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}
