"""Judgements from every format, what is wrong with each broken one, and the split by question."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from tests.tiny import vicuna_eval
from tract_fast.data.feedback import Example, question_overlap, read_examples, split_by_question
from tract_fast.data.prompt import PARTS, fill_template
from tract_fast.data.records import Skipped
from tract_fast.errors import UserError

LABELS, VALUES = ("1", "2", "3", "4", "5"), (1.0, 2.0, 3.0, 4.0, 5.0)
PLAIN = {"prompt": "p", "rationale": "r", "score": 3}
COLLECTION = {"instruction": "p", "output": "Fine. So the overall score is 4. [RESULT] 4"}
BENCHMARK = {"instruction": "p", "gpt4_score": [4, 5], "gpt4_feedback": ["a", "b"]}


@pytest.fixture
def load(tmp_path):
    def run(*records, labels=LABELS, values=VALUES, rationale="keep", on_error="fail"):
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return read_examples(str(file), labels=labels, values=values, rationale=rationale, on_error=on_error)

    return run


def test_plain(load):
    more = {**PLAIN, "id": "mine", "question": 81, "weight": 2, "other": [1]}
    heading = {**PLAIN, "prompt": "Q: why?\n\n###Response to evaluate:\nso"}
    assert load(PLAIN, more, heading).examples == [
        Example(id="data.jsonl:1", prompt="p", rationale="r", score=3.0, question="p", weight=1.0),
        Example(id="mine", prompt="p", rationale="r", score=3.0, question="81", weight=2.0),
        Example(id="data.jsonl:3", prompt=heading["prompt"], rationale="r", score=3.0, question="Q: why?"),
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" \nGood, clear.\n", "Good, clear."),
        ("Good. So the overall score is 4. [RESULT] 4", "Good."),
        ("Good. So the overall impression is fine. So the overall score is 4.", "Good."),
        ("Good. [RESULT] 4", "Good."),
        ("[RESULT] 2? No. So the overall score is 3.", "[RESULT] 2? No."),
        ("Good.\n\nSo, overall, 4", "Good.\n\nSo, overall, 4"),
        ("Fine. Therefore, the overall score is 4. [RESULT] 4", "Fine."),
        (
            "Dull, so the overall impression is poor; hence the overall score is 2",
            "Dull, so the overall impression is poor;",
        ),
    ],
)
def test_rationale_ends_before_the_verdict(load, text, kept):
    assert load({**PLAIN, "rationale": text}).examples[0].rationale == kept


def test_feedback_collection(load):
    parts = {part: f"<{part}>" for part in PARTS}
    first, second = load(COLLECTION, {**parts, "output": COLLECTION["output"]}).examples
    assert first == Example(id="data.jsonl:1", prompt="p", rationale="Fine.", score=4.0, question="p")
    assert second.prompt == fill_template(parts) and "[<orig_criteria>]" in second.prompt
    assert second.question == second.prompt.split("\n\n###Response to evaluate")[0]
    assert load({**parts, **COLLECTION}).examples[0].prompt == "p", "an instruction is used as it is"


@pytest.mark.parametrize(
    ("tail", "score"),
    [
        ("So the overall score is 4. [RESULT] 4", 4),
        ("[RESULT] 2", 2),
        ("So the overall score is 5.", 5),
        ("So the overall score is a 3", 3),
        ("So the overall score is **3** [RESULT] (3)", 3),
        ("Not a [RESULT] 1. So the overall score is 2. [RESULT] 2\n", 2),
        ("So the overall score is high. [RESULT] 4", 4),
        ("So the overall score is 4 [RESULT] 5", "two scores: 5 in [RESULT] and 4 in the score sentence"),
        ("So the overall score is high", "score = 'high' is not on the scale"),
        ("So the overall score is 7.", "score = '7' is not on the scale"),
        ("The end", "output has no score"),
        ("[RESULT] 4.5", "score = '4.5' is not on the scale"),
        ("[RESULT] 45", "score = '45' is not on the scale"),
        ("[RESULT] 6", "score = '6' is not on the scale"),
    ],
)
def test_score_in_an_output(load, tail, score):
    record = {**COLLECTION, "output": f"Well argued. {tail}"}
    if isinstance(score, str):
        assert score in load(record, PLAIN, on_error="skip").skipped[0].why
    else:
        assert load(record).examples[0].score == score


def test_benchmark_has_one_example_per_judgement(load):
    broken = {**BENCHMARK, "gpt4_score": [4, 9, 1], "gpt4_feedback": ["a", "b", "c"]}
    loaded = load(BENCHMARK, broken, on_error="skip")
    assert [(e.id, e.score, e.rationale) for e in loaded.examples] == [
        ("data.jsonl:1#1", 4.0, "a"),
        ("data.jsonl:1#2", 5.0, "b"),
        ("data.jsonl:2#1", 4.0, "a"),
        ("data.jsonl:2#3", 1.0, "c"),
    ]
    assert [s.where for s in loaded.skipped] == ["data.jsonl:2#2"]


@pytest.mark.parametrize("record", [PLAIN, COLLECTION, BENCHMARK])
def test_rationales_can_be_dropped(load, record):
    bare = {k: v for k, v in record.items() if k not in ("rationale", "gpt4_feedback")}
    for r in (record, bare):
        assert {e.rationale for e in load(r, rationale="drop").examples} == {""}


def without(record, *names, **changes):
    return {**{k: v for k, v in record.items() if k not in names}, **changes}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"question": "q", "answer": "a"}, "its fields (question, answer) are of no known format"),
        ({}, "its fields (none) are of no known format"),
        (without(PLAIN, "rationale"), 'the field "rationale" is missing (data.rationale: drop'),
        (without(PLAIN, "score"), 'the field "score" is missing'),
        ({**PLAIN, "score": None}, 'the field "score" is missing'),
        ({**PLAIN, "prompt": " \n"}, 'the field "prompt" is empty'),
        ({**PLAIN, "prompt": ["p"]}, "the field \"prompt\" is ['p'], not a text"),
        ({**PLAIN, "prompt": "half \ud83d"}, 'the field "prompt" holds half a character'),
        ({**PLAIN, "rationale": ""}, 'the field "rationale" is empty'),
        ({**PLAIN, "rationale": " So the overall score is 3."}, "the rationale is empty"),
        ({**PLAIN, "rationale": 3}, 'the field "rationale" is 3, not a text'),
        ({**PLAIN, "score": 0}, "score = 0 is not on the scale: write one of the labels 1, 2, 3, 4, 5 as a text, or"),
        ({**PLAIN, "score": 5.01}, "score = 5.01 is not on the scale"),
        ({**PLAIN, "score": "good"}, "score = 'good' is not on the scale"),
        ({**PLAIN, "score": "4.5"}, "score = '4.5' is not on the scale"),
        ({**PLAIN, "score": True}, "score = True is not on the scale"),
        ({**PLAIN, "score": [3]}, "score = [3] is not on the scale"),
        ({**PLAIN, "score": 10**299}, "is not on the scale"),
        ({**PLAIN, "weight": 0}, "weight = 0: write a number above 0"),
        ({**PLAIN, "weight": "1"}, "weight = '1': write"),
        ({**PLAIN, "weight": True}, "weight = True: write"),
        ({**PLAIN, "id": 1.5}, 'the field "id" is 1.5, not a text'),
        ({**PLAIN, "id": "data.jsonl:1"}, "its id 'data.jsonl:1' is that of a record before it"),
        ({**PLAIN, "question": ""}, 'the field "question" is empty'),
        (without(COLLECTION, "instruction", orig_instruction="x"), 'the field "orig_response" is missing'),
        ({**COLLECTION, "output": "So the overall score is 4."}, "the rationale is empty"),
        ({**COLLECTION, "output": 4}, 'the field "output" is 4, not a text'),
        ({**BENCHMARK, "gpt4_score": 4}, 'the field "gpt4_score" is 4, not a list'),
        ({**BENCHMARK, "gpt4_score": []}, 'the field "gpt4_score" is [], not a list'),
        ({**BENCHMARK, "gpt4_score": [4]}, 'the field "gpt4_feedback" must be a list of 1 texts'),
        (without(BENCHMARK, "gpt4_feedback"), 'the field "gpt4_feedback" must be a list of 2 texts'),
        (without(BENCHMARK, "instruction"), 'the field "prompt" is missing'),
    ],
)
def test_broken_record(load, record, why):
    loaded = load(PLAIN, record, {**PLAIN, "score": 4}, on_error="skip")
    assert [e.score for e in loaded.examples] == [3.0, 4.0]
    assert loaded.skipped[0].where.split("#")[0] == "data.jsonl:2"
    assert why in loaded.skipped[0].why
    with pytest.raises(UserError) as raised:
        load(PLAIN, record)
    assert str(raised.value).startswith("data.jsonl:2") and why in str(raised.value)
    assert "data.on_error: skip leaves such records out" in str(raised.value)


def test_first_of_several_is_named_and_the_rest_counted(load):
    with pytest.raises(UserError, match=r"^data.jsonl:2: score = 9 .* \(and 2 more broken records\); data.on_error"):
        load(PLAIN, {**PLAIN, "score": 9}, {}, PLAIN, {})


@pytest.mark.parametrize("on_error", ["fail", "skip"])
def test_nothing_left_is_an_error(load, on_error):
    with pytest.raises(
        UserError, match=r"^data.jsonl:1: its fields .* \(and 1 more broken records\); no record can be"
    ):
        load({"a": 1}, {"b": 2}, on_error=on_error)


def test_scores_as_numbers_labels_and_means(load):
    scores = [1, 2.0, "3", " 4 ", 4.5, 3 + 1 / 3]
    loaded = load(*({**PLAIN, "score": s} for s in scores))
    assert [e.score for e in loaded.examples] == [1.0, 2.0, 3.0, 4.0, 4.5, 3 + 1 / 3]
    assert loaded.notes == [
        "2 of 6 scores lie between two labels: the squared error takes them as they are, the text has the nearest label"
    ]
    assert load(PLAIN).notes == []


def test_labels_that_are_not_their_values(load):
    letters = {"labels": list("ABCDE"), "values": [5, 4, 3, 2, 1]}
    scores = [e.score for e in load({**PLAIN, "score": "A"}, {**PLAIN, "score": 1}, **letters).examples]
    assert scores == [5.0, 1.0]
    falling = {"labels": LABELS, "values": [5, 4, 3, 2, 1]}
    with pytest.raises(UserError, match="score = 1 is a label and another label's value: write the label as a text"):
        load({**PLAIN, "score": 1}, **falling)
    assert load({**PLAIN, "score": "1"}, {**PLAIN, "score": 3}, **falling).examples[0].score == 5.0
    assert [e.score for e in load(BENCHMARK, **falling).examples] == [2.0, 1.0], "what a judge wrote is a label"
    tables = [float(score) for score in BENCHMARK["gpt4_score"]]
    assert [e.score for e in load({**BENCHMARK, "gpt4_score": tables}, **falling).examples] == [2.0, 1.0]
    with pytest.raises(UserError, match=r"score = 1.0 is a label and another label's value"):
        load({**PLAIN, "score": 1.0}, **falling)
    assert load(COLLECTION, **falling).examples[0].score == 2.0
    unit = {"labels": LABELS, "values": [0, 0.25, 0.5, 0.75, 1]}
    with pytest.raises(UserError, match=r"score = 3 is not on the scale: .* or a number from 0 to 1"):
        load(PLAIN, **unit)


def test_what_any_record_may_carry(load):
    own = {"id": "mine", "question": "Q", "weight": 3}
    assert [(e.id, e.question, e.weight) for e in load({**BENCHMARK, **own}).examples] == [
        ("mine#1", "Q", 3.0),
        ("mine#2", "Q", 3.0),
    ]
    (example,) = load({**COLLECTION, **own}).examples
    assert (example.id, example.question, example.weight, example.where) == ("mine", "Q", 3.0, "data.jsonl:1")
    with pytest.raises(UserError, match="weight = 'abc'"):
        load({**COLLECTION, "weight": "abc"})


def test_null_fields_count_as_missing(load):
    """Tables of mixed records fill their gaps with null."""
    gaps = dict.fromkeys(["gpt4_score", "output", "instruction", "weight", "id", "question"])
    assert load({**gaps, **PLAIN}).examples == load(PLAIN).examples


def test_broken_json_is_skipped_beside_broken_records(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"prompt": \n' + json.dumps(PLAIN).encode() + b"\n{}\n")
    loaded = read_examples(str(file), labels=LABELS, values=VALUES, rationale="keep", on_error="skip")
    assert [e.id for e in loaded.examples] == ["x.jsonl:2"]
    assert [s.where for s in loaded.skipped] == ["x.jsonl:1", "x.jsonl:3"]
    assert isinstance(loaded.skipped[0], Skipped) and loaded.skipped[0].why.startswith("not JSON")


def test_weight_beyond_a_float_is_broken(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "p", "rationale": "r", "score": 3, "weight": 1e999}')
    with pytest.raises(UserError, match=r"^x.jsonl:1: weight = inf: write a number above 0; no record can be used"):
        read_examples(str(file), labels=LABELS, values=VALUES, rationale="keep", on_error="skip")


def test_question_is_never_empty(load):
    headings = [{**PLAIN, "prompt": f"\n###Response to evaluate:\n{text}"} for text in ("a", "b")]
    assert len({e.question for e in load(*headings).examples}) == 2


def test_vicuna_bench():
    loaded = read_examples(str(vicuna_eval()), labels=LABELS, values=VALUES, rationale="keep", on_error="fail")
    examples = loaded.examples
    assert Counter(e.score for e in examples) == {4: 489, 5: 338, 3: 80, 2: 41, 1: 12}
    assert (len(loaded.skipped), loaded.notes) == (0, [])
    assert len({e.id for e in examples}) == 960 and len({e.prompt for e in examples}) == 320
    assert len({e.question for e in examples}) == 80, "each of 80 questions is answered by 4 models"
    assert examples[0].id == "vicuna_eval.json:2#1"
    train, held = split_by_question(examples, 0.1, seed=0)
    assert (len(train), len(held)) == (864, 96) and question_overlap(train, held) == 0


def some(questions):
    return [Example(id=str(i), prompt="p", rationale="r", score=1.0, question=q) for i, q in enumerate(questions)]


@settings(max_examples=200)
@given(
    questions=st.lists(st.sampled_from("abcdefgh"), min_size=2).filter(lambda q: len(set(q)) > 1),
    share=st.floats(0.001, 0.999),
    seed=st.integers(0, 9),
    shuffled=st.randoms(use_true_random=False),
)
def test_split_keeps_questions_whole(questions, share, seed, shuffled):
    examples = some(questions)
    train, held = split_by_question(examples, share, seed)
    assert sorted(train + held, key=lambda e: int(e.id)) == examples
    assert train == [e for e in examples if e in train] and held == [e for e in examples if e in held]
    assert train and held and question_overlap(train, held) == 0
    n = len(set(questions))
    assert abs(len({e.question for e in held}) - share * n) <= 1
    again = examples.copy()
    shuffled.shuffle(again)
    assert {e.id for e in split_by_question(again, share, seed)[1]} == {e.id for e in held}


def test_split_depends_on_the_seed_and_refuses_what_it_cannot_do():
    examples = some(map(str, range(100)))
    held = [tuple(e.id for e in split_by_question(examples, 0.2, seed)[1]) for seed in range(5)]
    assert len(set(held)) == 5 and {len(h) for h in held} == {20}
    assert held[0] != tuple(str(i) for i in range(20))
    assert split_by_question(examples, 0.0, 0) == (examples, [])
    with pytest.raises(UserError, match=r"data.holdout = 0.5: a split needs two questions"):
        split_by_question(some("aaa"), 0.5, 0)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"data.holdout = .*: write a share"):
            split_by_question(examples, share, 0)


def test_question_overlap():
    assert question_overlap(some("aabc"), some("bbcd")) == 2
    assert question_overlap(some("a"), []) == 0


@pytest.mark.parametrize("seed", range(10))
def test_a_question_is_on_one_side_however_rationales_are_read(tmp_path, seed):
    """Training leaves out records without a rationale, evaluation does not: both must split alike."""
    path = tmp_path / "d.jsonl"
    records = [{"prompt": f"p{i}", "score": 1 + i % 5, "rationale": "kind"} for i in range(40)]
    for i in (3, 8, 11, 19, 20, 33):
        records[i]["rationale"] = ["", None, 7, "[RESULT] 4", "  ", []][i % 6]
    bench = [{"instruction": f"b{i}", "gpt4_score": [1, 2], "gpt4_feedback": ["kind", "curt"]} for i in range(8)]
    bench[2].pop("gpt4_feedback")
    bench[5]["gpt4_feedback"] = ["kind"]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*records, *bench, {"prompt": "x"}]))
    sides = []
    for rationale in ("keep", "drop", "optional"):
        loaded = read_examples(str(path), labels=LABELS, values=VALUES, rationale=rationale, on_error="skip")
        train, held = split_by_question(loaded.examples, 0.25, seed, loaded.questions)
        sides.append(({e.question for e in train}, {e.question for e in held}))
    assert not any(train & held for train, _ in sides for _, held in sides)
    assert len(loaded.questions) == 48
