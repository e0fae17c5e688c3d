"""The Vicuna bench as training and test data for the recipes here: train.jsonl and test.jsonl in a folder.

    python recipes/vicuna/split.py PATH/vicuna_eval.json runs/vicuna/data

The 80 questions are split as ``data.holdout: 0.2`` with ``train.seed: 42`` splits them. Training gets one judgement per
prompt (256; which of the three changes from prompt to prompt), so that the second stage writes one rationale per
prompt; test keeps all three scores of its 64 prompts, whose mean is the label.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from tract_fast.data import feedback

LABELS, VALUES = ("1", "2", "3", "4", "5"), (1.0, 2.0, 3.0, 4.0, 5.0)


def main(source: str, folder: Path) -> None:
    loaded = feedback.read_examples(source, labels=LABELS, values=VALUES, rationale="keep", on_error="fail")
    train, test = feedback.split_by_question(loaded.examples, 0.2, 42)
    by_prompt = defaultdict(list)
    for example in train:
        by_prompt[example.prompt].append(example)
    one_each = [examples[i % len(examples)] for i, examples in enumerate(by_prompt.values())]
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", one_each), ("test", test)):
        records = (feedback.as_record(e, dict(zip(VALUES, LABELS, strict=True))) for e in chosen)
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(chosen)} judgements on {len({e.question for e in chosen})} questions")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
