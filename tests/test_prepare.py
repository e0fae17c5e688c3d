"""What the data settings do, each through ``prepare``; and what a dry run counts."""

from __future__ import annotations

import json

import pytest
import torch

from tests.tiny_runs import tiny_recipe, write_data
from tract_fast import estimate, feed, model, trace, train
from tract_fast.attention import DOCUMENTS
from tract_fast.data import prompt
from tract_fast.errors import UserError
from tract_fast.prepare import prepare
from tract_fast.sharing import choose_sharing


def prepared(recipe):
    lines: list[str] = []
    return prepare(recipe, lines.append), "\n".join(lines)


def edited(tmp_path, change):
    """The data file of the recipes here, its records (a list of dicts) changed in place by ``change``."""
    path = tmp_path / "data.jsonl"
    records = [json.loads(line) for line in write_data(path).read_text().splitlines()]
    change(records)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_limit_counts_training_examples(tmp_path):
    whole, _ = prepared(tiny_recipe(tmp_path))
    some, _ = prepared(tiny_recipe(tmp_path, data__limit=5))
    assert [e.id for e in some.train] == [e.id for e in whole.train][:5]
    assert [e.id for e in some.held_out] == [e.id for e in whole.held_out]


def test_holdout_splits_questions(tmp_path):
    data, _ = prepared(tiny_recipe(tmp_path, data__holdout=0.25))
    train_questions, held = ({e.question for e in part} for part in (data.train, data.held_out))
    assert len(held) == 3 and len(train_questions) == 9 and not held & train_questions


def test_eval_is_read_and_overlap_is_told(tmp_path):
    other = write_data(tmp_path / "eval.jsonl", n=6, seed=1)
    data, said = prepared(tiny_recipe(tmp_path, data__holdout=0.0, data__eval=str(other)))
    assert [e.id for e in data.held_out] == [f"eval.jsonl:{n}" for n in range(1, 7)]
    assert "warning: 3 questions are in both data.train and data.eval" in said


def test_prompts_without_a_question_are_told(tmp_path):
    edited(tmp_path, lambda records: [r.pop("question") for r in records])
    _, said = prepared(tiny_recipe(tmp_path))
    assert "24 prompts have no field question" in said


def test_broken_records_are_skipped_and_listed(tmp_path):
    def spoil(records):
        del records[3]["score"]
        records[7]["rationale"] = "It ends <|im_end|> here."

    edited(tmp_path, spoil)
    with pytest.raises(UserError, match=r'^data.train: data.jsonl:4: the field "score" is missing'):
        prepared(tiny_recipe(tmp_path))
    data, said = prepared(tiny_recipe(tmp_path, data__on_error="skip", data__holdout=0.0))
    assert len(data.train) == 22
    assert [x["where"] for x in data.left_out] == ["data.jsonl:4", "data.jsonl:8"]
    assert "1 broken records" in said and "1 of 23 train examples left out, first data.jsonl:8" in said
    data.write_left_out(tmp_path / "left_out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()] == data.left_out


def test_too_long_for_the_context(tmp_path):
    edited(tmp_path, lambda records: records[0].update(rationale="It is kind. " * 2000))
    with pytest.raises(UserError, match=r"^data.max_len = 3000: 1 of 24 examples are longer"):
        prepared(tiny_recipe(tmp_path, data__holdout=0.0))
    with pytest.raises(UserError, match=r"^the longest example has \d+ tokens, the model's context is \d+"):
        prepared(tiny_recipe(tmp_path, data__holdout=0.0, data__max_len=100_000))
    data, said = prepared(tiny_recipe(tmp_path, data__holdout=0.0, data__max_dropped=0.1))
    assert len(data.train) == 23 and "tokens, more than data.max_len = 3000" in said


def test_control_tokens_in_prompts_are_told(tmp_path):
    edited(tmp_path, lambda records: records[0].update(prompt="What is <|im_start|>? " + records[0]["prompt"]))
    _, said = prepared(tiny_recipe(tmp_path))
    assert "warning: 1 prompts hold the text '<|im_start|>'" in said


def test_rationales_dropped(tmp_path):
    data, _ = prepared(tiny_recipe(tmp_path, data__rationale="drop"))
    target = data.tokenizer.decode(data.train[0].ids[data.train[0].prompt_len :])
    assert target.startswith("So the overall score is ")


def test_a_batch_larger_than_the_data_is_told(tmp_path):
    _, said = prepared(tiny_recipe(tmp_path, train__batch=100, data__holdout=0.0))
    assert "warning: train.batch = 100 is more than the 24 training examples" in said


def test_fields_that_nothing_reads_are_told(tmp_path):
    edited(tmp_path, lambda records: [r.update(weigth=2) for r in records[:5]])
    _, said = prepared(tiny_recipe(tmp_path))
    assert "fields that nothing reads: weigth (5); those that are read are prompt, rationale, score, weight" in said


def test_prompts_of_the_feedback_collection_are_known(tmp_path, monkeypatch):
    assert not prepared(tiny_recipe(tmp_path))[0].template
    monkeypatch.setattr(prompt, "TEMPLATE", "Judge this: {orig_response}")  # the real one is longer than tiny contexts
    edited(tmp_path, lambda records: [r.update(prompt=f"Judge this: {r['prompt']}") for r in records])
    assert prepared(tiny_recipe(tmp_path))[0].template


@pytest.mark.parametrize("share", ["auto", "off"])
def test_plan_counts_what_training_does(tmp_path, share, monkeypatch):
    write_data(tmp_path / "data.jsonl", siblings=3)
    recipe = tiny_recipe(tmp_path, train__max_tokens=120, data__share_prompts=share)
    data, _ = prepared(recipe)
    sharing = choose_sharing(recipe, data.config, DOCUMENTS, data.train, world=1)
    assert sharing.share == {"auto": "prompts", "off": None}[share]
    step = estimate.plan(recipe, data.train, sharing=sharing)
    keys, collate_of = [], feed.collate

    def watched(*args, **options):
        batch = collate_of(*args, **options)
        keys.append(0 if batch.key_index is None else len(batch.key_index))
        return batch

    monkeypatch.setattr(feed, "collate", watched)
    train.run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval" not in line]
    assert step.steps == len(steps)
    assert step.tokens_per_step == pytest.approx(sum(line["tokens"] for line in steps) / len(steps))
    assert step.max_tokens <= 120 and step.micro_batches > 1
    assert step.max_keys == max(keys) and bool(max(keys)) is (share == "auto")


@pytest.mark.parametrize("rank", [0, 4])
def test_memory_of_weights_and_state_is_exact(tmp_path, rank):
    recipe = tiny_recipe(tmp_path, lora__rank=rank)
    data, _ = prepared(recipe)
    parts = estimate.needed(recipe, data, estimate.this_machine(1)).tensors
    lm = model.build(recipe, data.config, data.tokenizer, data.scale, torch.device("cpu"), lambda text: None).lm
    trained = sum(p.numel() * 4 for p in lm.parameters() if p.requires_grad)
    frozen = sum(p.numel() * 4 for p in lm.parameters() if not p.requires_grad)
    assert parts[trace.WEIGHTS] == trained + frozen
    assert parts[trace.STATE] == 2 * trained
