"""Settings as YAML: every mistake in a file is told with its line, every strange name with the one that was meant."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tract_fast import recipe as recipes, settings
from tract_fast.errors import UserError
from tract_fast.recipe import FIELDS

REQUIRED = "model: {path: owner/name}\ndata: {train: d.jsonl}\nrun: {dir: runs/x}\n"  # three lines


@pytest.fixture
def refused(tmp_path):
    """A function that returns the message that refuses more of a file and a command line, without the file's folder."""

    def refused(more="", *argv):
        path = tmp_path / "r.yaml"
        path.write_bytes((REQUIRED + more).encode())
        with pytest.raises(UserError) as caught:
            recipes.load(path, argv)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('train:\n  lr: "abc"\n', 'train.lr = "abc": must be a number (r.yaml:5)'),
        ("train: {lr: [1, 2]}\n", "train.lr = [1, 2]: must be a number (r.yaml:4)"),
        ("train: {lr: {a: 1}}\n", "train.lr = {a: 1}: must be a number (r.yaml:4)"),
        ("train: {lr: }\n", "train.lr = null: must be a number (r.yaml:4)"),
        ("train: {lr: .nan}\n", "train.lr = .nan: must be a number (r.yaml:4)"),
        ("train: {lr: 1e999}\n", "train.lr = 1e999: must be a number (r.yaml:4)"),
        ("train: {batch: 8.5}\n", "train.batch = 8.5: must be a whole number (r.yaml:4)"),
        ("train: {max_steps: x}\n", "train.max_steps = x: must be a whole number or null (r.yaml:4)"),
        ("train: {shuffle: 2}\n", "train.shuffle = 2: must be true or false (r.yaml:4)"),
        ("train: {betas: [1, 2, 3]}\n", "train.betas = [1, 2, 3]: must be a list of 2 values in brackets (r.yaml:4)"),
        ("score: {labels: A}\n", "score.labels = A: must be a list such as [A, B] (r.yaml:4)"),
        ("score: {labels: [A, null]}\n", "score.labels = [A, null]: must be a list such as [A, B] (r.yaml:4)"),
        ("train.trackers: wandb", "train.trackers = wandb: must be a list such as [tensorboard, wandb] (r.yaml:4)"),
        ("train.trackers: [wb]", "train.trackers = wb: must be tensorboard or wandb or trackio (r.yaml:4)"),
        ("model.dtype: int8", "model.dtype = int8: must be bfloat16 or float32 (r.yaml:4)"),
        ("data.chat_template_kwargs: 3", "data.chat_template_kwargs = 3: must be a mapping such as {name: value} "),
        ("train: 5\n", "train (r.yaml:4) is a section: write its settings indented below it"),
        ("train: [lr]\n", "train (r.yaml:4) is a section: write its settings indented below it"),
        ("train:\n\tlr: 1\n", "r.yaml:5: not valid YAML: found character '\\t' that cannot start any token (YAML is"),
        ("train:\n  lr: 1\n  lr: 2\n", "r.yaml:6: lr stands twice, first in line 5"),
        ("model: {dtype: float32}\n", "r.yaml:4: model stands twice, first in line 1"),
        ("model.path: x\n", "model.path stands twice: (r.yaml:1) and (r.yaml:4)"),
        ("data.chat_template_kwargs: {a: {b: 1, b: 2}}", "r.yaml:4: b stands twice, first in line 4"),
        ("train: [1, 2\n", "r.yaml:5: not valid YAML: expected ',' or ']'"),
        ("train: {lr: !!python/name:os.system ''}\n", "r.yaml:4: the tag !!python/name:os.system is not supported"),
        ("train: &a {lr: 1}\nlora: *a\n", "r.yaml:5: not valid YAML: aliases (*name) are not supported"),
        ("---\ntrain: {lr: 1}\n", "r.yaml:4: not valid YAML: but found another document"),
        ("? [a]\n: 1\n", "r.yaml:4: the name of a setting must be a word"),
        ("train: {lr: '\x07'}\n", "r.yaml: not valid YAML: unacceptable character #x0007"),
        ("data.chat_template_kwargs: {a: " + "[" * 20_000, "r.yaml: not valid YAML: nested too deeply"),
    ],
)
def test_file_errors_name_the_line(refused, text, message):
    assert refused(text).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "r.yaml is empty: a recipe needs at least model.path, data.train and run.dir"),
        (b"# nothing\n---\n", "r.yaml is empty"),
        (b"just words", "r.yaml holds no settings"),
        (b"- a\n- b\n", "r.yaml holds no settings"),
        ("train: {lr: 1}".encode("utf-16"), "r.yaml is not UTF-8 text (byte 0): save it as UTF-8"),
        (b"data: {train: d}\nrun: {dir: x}", "model.path is not set: write it in r.yaml or give --model.path VALUE"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        recipes.load("r.yaml", [])
    assert str(caught.value).startswith(message)


def test_places_that_are_no_file(tmp_path):
    (tmp_path / "demo.yaml").write_text(REQUIRED)
    with pytest.raises(UserError, match=r"demmo.yaml: no such recipe file; did you mean .*/demo.yaml\?$"):
        recipes.load(tmp_path / "demmo.yaml", [])
    with pytest.raises(UserError, match=r"none/r.yaml: no such recipe file$"):
        recipes.load(tmp_path / "none" / "r.yaml", [])
    with pytest.raises(UserError, match=r"is a folder, not a recipe$"):
        recipes.load(tmp_path, [])
    (tmp_path / "recipe.yaml").write_text(REQUIRED)
    with pytest.raises(UserError, match=r"is a folder; did you mean .*/recipe.yaml\?$"):
        recipes.load(tmp_path, [])


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.lrr", "; did you mean train.lr?"),
        ("trian.lr", "; did you mean train.lr?"),
        ("trian.lrr", "; did you mean train.lr?"),
        ("lr", "; did you mean train.lr?"),
        ("Train.LR", "; did you mean train.lr?"),
        ("train.max_len", "; did you mean data.max_len?"),
        ("train.learning_rate", "; did you mean train.lr?"),
        ("num_train_epochs", "; did you mean train.epochs?"),
        ("per_device_train_batch_size", "; did you mean train.batch?"),
        ("lora_r", "; did you mean lora.rank?"),
        ("train.steps", "; did you mean train.max_steps?"),
        ("loss.weight", "; did you mean loss.ce_weight or loss.regression_weight?"),
        ("data.cutoff_len", "; did you mean data.max_len?"),
        ("optimizer.lr", "; did you mean train.lr?"),
        ("train.optim", ": the optimizer is AdamW, set by train.betas, train.eps and train.weight_decay"),
        ("train.gradient_accumulation_steps", ": train.batch is the whole step's; micro-batches are packed up to"),
        ("fp16", ": float16 needs loss scaling, which is not there; model.dtype is bfloat16 or float32"),
        ("xyzzy.plugh", ""),
    ],
)
def test_unknown_settings(refused, key, meant):
    where = " (r.yaml:4)"
    assert refused(f"{key}: 1\n").startswith(f"{key}{where}: no such setting{meant}")
    assert refused("", f"--{key}", "1").startswith(f"--{key}: no such setting{meant}")
    if not meant:
        assert refused(f"{key}: 1\n").endswith("no such setting")


def test_unknown_sections_and_parts(refused):
    assert refused("train.max-steps: 1\n").endswith("no such setting; did you mean train.max_steps?")
    assert refused("trian: 1\n") == "trian (r.yaml:4): no such section; did you mean train?"
    assert refused("", "--train", "{lr: 1}").startswith("--train: this is a section: name one of its settings, such as")
    key = "data.chat_template_kwargs"
    assert refused("", f"--{key}.x", "1") == f"--{key}.x: {key} is one value: write {key}: {{x: ...}}"
    many = refused("".join(f"{name}: 1\n" for name in "abcdefg"))
    assert many.startswith("a (r.yaml:4): no such setting") and many.endswith("; and 2 more")


def test_other_names_lead_to_settings_that_are_there():
    refused_names = " ".join(settings.NO_SETTING).split()
    other_names = " ".join(settings.OTHER_NAMES.values()).split()
    own = {key.rpartition(".")[2] for key in FIELDS}
    assert set(settings.OTHER_NAMES) <= set(FIELDS)
    assert len(set(other_names + refused_names)) == len(other_names + refused_names)
    assert not own & set(other_names + refused_names)


def test_every_setting_has_its_meaning():
    for section in recipes.SECTIONS.values():
        assert section.__doc__ and set(settings.docs(section)) == {f.name for f in fields(section)}
    assert [k for k, f in FIELDS.items() if f.default is MISSING and f.default_factory is MISSING] == [
        "model.path",
        "data.train",
        "run.dir",
    ]


def test_base_gives_what_a_file_leaves_out(tmp_path):
    (tmp_path / "base.yaml").write_text(REQUIRED + "train: {lr: 1e-3, batch: 2}\n")
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "r.yaml"
    path.write_text("base: ../base.yaml\ntrain: {lr: 2e-3}\n")
    recipe = recipes.load(path, ["--run.dir", "elsewhere"])
    assert (recipe.train.lr, recipe.train.batch, recipe.run.dir, recipe.data.train) == (2e-3, 2, "elsewhere", "d.jsonl")
    assert "base" not in recipes.dump(recipe)


def test_mistakes_of_a_base_are_named(tmp_path):
    path, base = tmp_path / "r.yaml", tmp_path / "base.yaml"
    path.write_text("# a recipe\nbase: bass.yaml\n")
    base.write_text("base: r.yaml\n")
    with pytest.raises(
        UserError, match=r"base \(.*r.yaml:2\): .*bass.yaml: no such recipe file; did you mean .*base.yaml"
    ):
        recipes.load(path, [])
    path.write_text("base: base.yaml\n")
    with pytest.raises(UserError, match=r"r.yaml:1\): base \(.*base.yaml:1\): .*r.yaml is its own base"):
        recipes.load(path, [])
    base.write_text(REQUIRED + "train: {lr: fast}\n")
    with pytest.raises(UserError, match=r"train.lr = fast: must be a number \(.*base.yaml:4\)"):
        recipes.load(path, [])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_that_come_along_are_read(path):
    from tract_fast.pipeline import steps_of

    recipe = recipes.load(path, [])
    assert steps_of(recipe)[-1] == "evaluate"
    assert recipe.warnings() == []
    assert recipe.data.rationale == "keep" or not recipe.stage2.train
