"""Shared prompts compute the gradient of unshared ones, whatever is shared, and nothing leaks between siblings."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.operators import Called
from tests.test_attention import plain_varlen
from tests.tiny_models import tiny_lm
from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import attention, selfcheck, train
from tract_fast.attention import DOCUMENTS, VARLEN, hidden_states
from tract_fast.data import batch as batches
from tract_fast.data.batch import collate, normalizer, pack_examples, prompt_groups
from tract_fast.data.prompt import Encoded
from tract_fast.data.scores import ScoreScale
from tract_fast.data.tree import lay_out
from tract_fast.errors import UserError
from tract_fast.head import TractHead
from tract_fast.model import TractModel
from tract_fast.prepare import prepare
from tract_fast.selfcheck import bare_batch
from tract_fast.sharing import choose_sharing, count, obstacle, plan_step

CPU = torch.device("cpu")
VOCABULARY = 64
FAMILIES = ["llama", "qwen3", "mistral", "gemma3"]
GROUPS = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(3, 9), min_size=1, max_size=5)), max_size=4)


def tract_model(family):
    attention.register()
    lm = tiny_lm(family, vocabulary=VOCABULARY)
    lm.set_attn_implementation(DOCUMENTS)
    scale = ScoreScale(labels=tuple("123"), values=(1, 2, 3), token_ids=(5, 6, 7), prefix_ids=(1,), eos_id=0)
    lm.set_output_embeddings(TractHead(lm.get_output_embeddings(), scale, implementation="reference"))
    return TractModel(lm)


def in_float64(model):
    """``model`` with norms that compute in float64; transformers' own go through float32."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model.double()


def judgements(groups, seed):
    """Examples of few different tokens: prompts, and rationales of one prompt, often begin alike."""
    rng = np.random.default_rng(seed)
    found = []
    for prompt_len, lengths in groups:
        prompt = rng.integers(8, 10, prompt_len)
        for n in lengths:
            ids = np.concatenate([prompt, rng.integers(8, 11, n - 2), [rng.integers(5, 8), 0]])
            score, weight = float(rng.uniform(1, 3)), float(rng.uniform(0.5, 2))
            found.append(Encoded(ids, prompt_len, 0, score, weight, f"e{len(found)}", "q"))
    return [found[i] for i in rng.permutation(len(found))]


def gradients(model, examples, micro_batches, share, reduction="token"):
    """(loss, gradient of every parameter) of the step that ``micro_batches`` make up."""
    norm = normalizer(examples, ce_weight=0.9, regression_weight=0.7, score_ce=True, ce_reduction=reduction)
    model.zero_grad()
    loss = 0.0
    for chosen in micro_batches:
        out = model(collate([examples[i] for i in chosen], norm, score_ce=True, share=share))
        out.loss.backward()
        loss += out.loss.item()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    whole = torch.stack([g.norm() for g in expected[1].values()]).norm()
    for name, want in expected[1].items():
        # a gradient that nearly cancels is held against the rounding of the others (the same in float64: 1e-12, below)
        error = (found[1][name] - want).norm() / max(want.norm(), 1e-2 * whole)
        assert error < tolerance, (name, error)


@settings(max_examples=25)
@given(
    groups=GROUPS.filter(bool),
    room=st.integers(0, 80),
    seed=st.integers(0, 99),
    reduction=st.sampled_from(["token", "sequence"]),
    share=st.sampled_from(["prompts", "heads"]),
)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_unshared_prompts(family, groups, room, seed, reduction, share):
    """Against every example in a micro-batch of its own; windows of 5 are shorter than most prompts."""
    model, examples = tract_model(family), judgements(groups, seed)
    alone = gradients(model, examples, [[i] for i in range(len(examples))], None, reduction)
    packed = pack_examples(examples, max(len(e.ids) for e in examples) + room, 1, prompt_groups(examples).of)[0]
    assert_same(gradients(model, examples, packed, share, reduction), alone, 1e-5)


@settings(max_examples=10)
@given(groups=GROUPS.filter(bool), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", [DOCUMENTS, VARLEN])
def test_gradient_in_float64(name, groups, seed):
    """Also through the one variable-length call that CUDA makes, with a stand-in for its kernel."""
    examples = judgements(groups, seed)
    model = in_float64(tract_model("mistral"))
    alone = gradients(model, examples, [[i] for i in range(len(examples))], None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_varlen", plain_varlen(True))
        model.lm.set_attn_implementation(name)
        shared = gradients(model, examples, [list(range(len(examples)))], "heads")
    assert_same(shared, alone, 1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_siblings_do_not_see_each_other(family):
    """Changing one rationale leaves prompt and sibling bit for bit as they were; changing the prompt does not."""
    model = tract_model(family)
    prompt, first, second = (torch.randint(8, 60, (n,)) for n in (20, 9, 12))
    first[0], second[0] = 10, 20

    def hidden(*documents):
        documents = list(documents)
        layout = lay_out([d.numpy() for d in documents], [len(prompt)] * len(documents), "heads")
        assert len(layout.segments) == 3
        return hidden_states(model.backbone, bare_batch(documents, layout)).split([20, 9, 12])

    before = hidden(torch.cat([prompt, first]), torch.cat([prompt, second]))
    after = hidden(torch.cat([prompt, (first + 1) % 60]), torch.cat([prompt, second]))
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])
    prompt = torch.cat([prompt[:-1], (prompt[-1:] + 1) % 60])
    moved = hidden(torch.cat([prompt, first]), torch.cat([prompt, second]))
    assert not torch.allclose(before[1], moved[1]) and not torch.allclose(before[2], moved[2])


def from_the_start(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """A kernel that aligns queries to the start of their keys: causal from the first on, later keys are never seen."""
    heads = [torch.arange(a, a + n) for a, n in zip(cu_k[:-1].tolist(), cu_q.diff().tolist(), strict=True)]
    index = torch.cat(heads)
    return RIGHT(q, k[index], v[index], cu_q, cu_q, max_q, max_q, **options)


def wrong_gradient(q, k, v, *lengths, **options):
    return RIGHT(q, k * 1.1 - (k * 0.1).detach(), v, *lengths, **options)


def wrong_window(q, k, v, cu_q, cu_k, *lengths, window_size, **options):
    """One key too many, where queries are fewer than keys."""
    wide = window_size[0] >= 0 and not torch.equal(cu_q, cu_k)
    return RIGHT(q, k, v, cu_q, cu_k, *lengths, window_size=(window_size[0] + wide, 0), **options)


RIGHT, _ = plain_varlen(True)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", [from_the_start, wrong_gradient, wrong_window])
def test_start_checks_find_another_alignment(monkeypatch, odd, dtype):
    """In output, where only the gradient is wrong, and where only a window is."""
    monkeypatch.setattr(attention, "_varlen", lambda: (RIGHT, True))
    assert "aligns queries to the end" in selfcheck.alignment(VARLEN, CPU, dtype, (6, 2, 32))
    monkeypatch.setattr(attention, "_varlen", lambda: (odd, True))
    with pytest.raises(UserError, match=r"data.share_prompts = auto: attention tract_varlen on cpu computes"):
        selfcheck.alignment(VARLEN, CPU, dtype, (6, 2, 32))


def test_start_checks_find_it_in_a_model(monkeypatch):
    monkeypatch.setattr(attention, "_varlen", lambda: (from_the_start, True))
    attention.register()
    with pytest.raises(UserError, match=r"the prompt of two shared.*write data.share_prompts: off"):
        selfcheck.packing(tiny_lm("llama"), torch.float32, VARLEN, None, 1.0, share=True)


def test_start_checks_find_what_is_drawn():
    """A model that draws random numbers in training under a name that nobody knows."""
    attention.register()
    lm = tiny_lm("llama")
    lm.get_decoder().norm.register_forward_hook(
        lambda module, args, out: torch.nn.functional.dropout(out, 0.1, module.training)
    )
    assert "packing check" in selfcheck.packing(lm, torch.float32, DOCUMENTS, None, 1.0)
    with pytest.raises(UserError, match=r"LlamaForCausalLM draws random numbers.*write data.share_prompts: off"):
        selfcheck.packing(lm, torch.float32, DOCUMENTS, None, 1.0, share=True)


def siblings(tmp_path, **settings):
    """A recipe over data with three rationales per prompt."""
    if not (tmp_path / "data.jsonl").exists():
        write_data(tmp_path / "data.jsonl", siblings=3)
    return tiny_recipe(tmp_path, **settings)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"data__share_prompts": "off"}, "data.share_prompts"),
        ({"lora__rank": 4, "lora__dropout": 0.1}, "lora.dropout = 0.1"),
    ],
)
def test_what_turns_sharing_off(tmp_path, change, what):
    recipe = siblings(tmp_path, **change)
    data = prepare(recipe, lambda text: None)
    sharing = choose_sharing(recipe, data.config, DOCUMENTS, data.train, 1)
    assert sharing.share is sharing.groups is None, "and sequences are shuffled one by one"
    assert sharing.line.startswith(f"shared prompts: off ({what}")


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, "RoPE is longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "RoPE is dynamic"),
        ({"resid_pdrop": 0.1}, "resid_pdrop = 0.1"),
        ({"dropout_rate": 0.1}, "dropout_rate = 0.1"),
        ({"hidden_dropout_prob": 0.1}, "hidden_dropout_prob = 0.1"),
        ({"layerdrop": 0.1}, "layerdrop = 0.1"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ({"ffn_config": {"moe_jitter_eps": 0.1}}, "moe_jitter_eps = 0.1"),
        ({"model_type": "phimoe"}, "phimoe draws its experts"),
        ({"output_router_logits": True}, "auxiliary loss"),
        ({"mamba_d_state": 16}, "keep a state"),
        ({"ssm_multipliers": None}, "keep a state"),
        ({"state_size": 16}, "keep a state"),
        ({"classifier_dropout": 0.1}, None),
        ({"resid_pdrop": 0.0}, None),
        ({"rope_parameters": {"rope_type": "llama3"}}, None),
    ],
)
def test_models_that_do_not_share(tmp_path, fields, what):
    config = tiny_lm("llama").config
    for name, value in fields.items():
        setattr(config, name, value)
    found = obstacle(siblings(tmp_path), config)
    assert found is None if what is None else what in found


def test_other_kernels_do_not_share(tmp_path):
    recipe = siblings(tmp_path, model__attention="flash_attention_2")
    assert "flash_attention_2 takes no keys but" in obstacle(recipe, tiny_lm("llama").config)


def test_the_order_does_not_depend_on_the_ranks(tmp_path):
    """Whether siblings meet in a micro-batch does; a run that goes on with other ranks must not repeat or skip any."""
    recipe = siblings(tmp_path, train__batch=3)
    data = prepare(recipe, lambda text: None)
    shared, orders = set(), set()
    for world, name in itertools.product(range(1, 9), (DOCUMENTS, VARLEN)):
        sharing = choose_sharing(recipe, data.config, name, data.train, world)
        members = [plan_step(recipe.train, data.train, sharing, step, world)[0] for step in range(6)]
        orders.add(tuple(e.id for step in members for e in step))
        shared.add(sharing.share)
    assert shared == {"prompts", "heads", None} and len(orders) == 1


def test_nothing_to_share_is_said(tmp_path):
    """One sequence a micro-batch: whatever the data have in common, it never meets."""
    recipe = siblings(tmp_path, train__batch=1)
    data = prepare(recipe, lambda text: None)
    sharing = choose_sharing(recipe, data.config, DOCUMENTS, data.train, 1)
    assert sharing.share is None and "no two sequences of a micro-batch have a beginning to share" in sharing.line
    assert "shuffled by prompt" in sharing.line


def test_heads_of_prompts_are_shared_in_one_call_alone(tmp_path):
    """Data without siblings, whose prompts have their template in common: SDPA shares nothing, one kernel call does."""
    recipe = tiny_recipe(tmp_path)
    data = prepare(recipe, lambda text: None)
    found = {name: choose_sharing(recipe, data.config, name, data.train, 1) for name in (DOCUMENTS, VARLEN)}
    assert found[DOCUMENTS].share is None and found[VARLEN].share == "heads"
    assert "x fewer" in found[VARLEN].line and "shuffled by prompt" not in found[VARLEN].line


def test_the_saving_that_is_told_is_that_of_the_run(tmp_path, capsys):
    recipe = siblings(tmp_path, train__max_steps=5, data__holdout=0.0, train__max_tokens=150)
    assert train.run(recipe) == 0
    printed = capsys.readouterr().out
    lines = [line for line in train.log.read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval" not in line]
    lines = lines[:6]
    data = prepare(recipe, lambda text: None)
    assert len(data.train) == 24 and len(lines) == 5
    line = choose_sharing(recipe, data.config, DOCUMENTS, data.train, 1).line
    assert line in printed and "the prompt of two shared, = each alone" in printed
    assert "8 prompts of 24 examples; shuffled by prompt" in line
    assert all(0 < step["tokens"] < step["logical_tokens"] for step in lines)
    assert " logical)" in printed


def test_counts_are_short():
    assert [count(n) for n in (9999, 412345, 4123456, 41234567)] == ["9999", "412k", "4123k", "41M"]


def whole_step(recipe):
    """Loss and gradients of a step over all the data, and the tokens it computed."""
    from tests.test_train import gradients as of_a_step

    loss, found, *_ = of_a_step(recipe)
    return loss, found


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lora__rank": 4},
        {"lora__rank": 4, "train__activation_checkpointing": "full"},
        {"train__activation_checkpointing": "selective", "family": "mistral"},
        {"train__compile": True},
    ],
    ids=["full", "lora", "recompute", "selective", "compiled"],
)
def test_trained_as_unshared(tmp_path, change):
    """Through FSDP2 on a mesh of one, with what trains beside it: the step of all the data, shared and not."""
    whole = {"train__batch": 100, "data__holdout": 0.0, "train__max_tokens": 400, **change}
    unshared = whole_step(siblings(tmp_path, data__share_prompts="off", **whole))
    assert_same(whole_step(siblings(tmp_path, **whole)), unshared, 1e-5)


def test_held_out_metrics_are_the_same(tmp_path, monkeypatch):
    """And computed on shared prompts, within the limit of tokens."""
    most, collated = 0, batches.collate

    def collate(*args, **options):
        nonlocal most
        batch = collated(*args, **options)
        most = max(most, batch.input_ids.shape[1])
        return batch

    monkeypatch.setattr(batches, "collate", collate)
    on, off = (siblings(tmp_path, run=name, data__share_prompts=name) for name in ("auto", "off"))
    for recipe in (on, off):
        assert train.run(replace(recipe, train=replace(recipe.train, max_steps=1))) == 0
    first = [train.log.read_metrics(tmp_path / name / "metrics.jsonl")[0]["eval"] for name in ("auto", "off")]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert most <= on.train.max_tokens, "packed as laid out"


def test_repeated_rows_are_summed_in_order():
    """Rows of the head that are there once for each rationale: on CUDA plain indexing would leave their order open."""
    model, examples = tract_model("llama"), judgements([(4, [3, 3])], 0)
    norm = normalizer(examples, ce_weight=1, regression_weight=1, score_ce=True, ce_reduction="token")
    batch = collate(examples, norm, score_ce=True, share="prompts")
    assert len(set(batch.rows.tolist())) < len(batch.rows)
    hidden = torch.randn(batch.input_ids.shape[1], 32, requires_grad=True)
    with Called() as called:
        model.head(hidden, batch).loss.backward()
    assert torch.ops.tract_fast.add_rows.default in called.operators
