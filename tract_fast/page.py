"""``tract-fast report DIR``: all runs, evaluations and generations below a folder on one page that needs nothing else.

Rationales and prompts are a model's and strangers' words: everything is escaped, and the page runs no script.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from tract_fast import report
from tract_fast.checkpoint import replace_file
from tract_fast.errors import UserError
from tract_fast.evaluate import METRICS
from tract_fast.generate import HEALTH
from tract_fast.judging import PREDICTIONS, draws, read_predictions
from tract_fast.metrics import MEASURES

PAGE = "report.html"
SHOWN = 3  # examples of each kind
TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; border-bottom: 1px solid #ccc; margin-top: 2.5em } h3 { font-size: 1em }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; white-space: nowrap }
td, th { padding: .25em .5em; border-bottom: 1px solid #e4e4e4; text-align: right }
td:first-child, th:first-child { text-align: left } small { display: block; color: #666; font-size: 11px }
img { max-width: 100% } details { margin: .6em 0 } summary { cursor: pointer }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .8em; font-size: 12.5px }
.note { color: #666; font-size: 13px }
</style></head><body>
<h1>{{ title }}</h1>
{% macro value(x) %}{% if x.value is none %}undefined{% else %}{{ "%.3f" | format(x.value) }}{% if x.low is not none %}
<small>{{ "%.3f" | format(x.low) }} to {{ "%.3f" | format(x.high) }}</small>{% endif %}{% endif %}{% endmacro %}
{% macro table(head, rows) %}<div class="wide"><table>
<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{% if cell is mapping %}{{ value(cell) }}{% else %}{{ cell }}{% endif
%}</td>{% endfor %}</tr>{% endfor %}
</table></div>{% endmacro %}
{% if evaluations %}<h2>Evaluations side by side</h2>
{{ table(head, rows) }}
<p class="note">Of the expected score (RAIL), and of the decoded one; with 95% intervals, bootstrap over questions. Only
evaluations of the same data compare; "given" rationales are easier than "generated" ones.</p>{% endif %}
{% for e in evaluations %}<h2>{{ e.name }}</h2>
<p class="note">{{ e.about }}</p><img alt="scores of {{ e.name }}" src="{{ e.picture }}">
{{ table(["the same judgements, read as"] + measures, e.readings) }}
{% for kind, examples in e.examples.items() if examples %}<h3>{{ kind }}</h3>
{% for x in examples %}<details><summary>{{ x.id }}: true {{ "%.2f" | format(x.label) }}, expected {{ "%.2f" |
format(x.expected_score) }}</summary>{% for text in x.texts %}<pre>{{ text }}</pre>{% endfor %}</details>
{% endfor %}{% endfor %}{% endfor %}
{% for g in generations %}<h2>{{ g.name }}</h2><p class="note">{{ g.about }}</p>
{{ table(["", "rationales"], g.rows) }}{% endfor %}
{% for t in trainings %}<h2>{{ t.name }}</h2><img alt="curves of {{ t.name }}" src="{{ t.picture }}">{% endfor %}
</body></html>
"""


def write(folder: Path) -> Path:
    """Write ``report.html`` in ``folder`` from all that is below it; returns its path. Raises UserError for nothing."""
    parts: dict[str, list[dict[str, Any]]] = {
        "evaluations": _each(folder, METRICS, evaluation),
        "generations": _each(folder, HEALTH, generation),
        "trainings": _each(folder, "metrics.jsonl", training),
    }
    if not any(parts.values()):
        raise UserError(f"{folder} holds no run, evaluation or generation of tract-fast")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    head = ["", "data", "rationales", "prompts", *MEASURES, "decoded, pearson", "no score", "score mass"]
    rows = [[e["name"], *e["row"]] for e in parts["evaluations"]]
    text = page.render(title=str(folder), head=head, rows=rows, measures=list(MEASURES), **parts)
    replace_file(folder / PAGE, text)
    return folder / PAGE


def _each(folder: Path, file: str, part: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    """``part`` of every folder that holds ``file``, by its place below ``folder``; files of other programs are told."""
    found = []
    for place in sorted(path.parent for path in folder.rglob(file)):
        name = str(place.relative_to(folder))
        try:
            found.append({"name": folder.name if name == "." else name, **part(place)})
        except (ValueError, KeyError, TypeError, UserError) as error:
            print(f"left out: {place / file} is none of tract_fast's, or of another version ({error!r:.80})")
    return found


def evaluation(place: Path) -> dict[str, Any]:
    """What the page shows of one evaluation."""
    metrics = json.loads((place / METRICS).read_text(encoding="utf-8"))
    records = list(read_predictions(place / PREDICTIONS).values())
    rail, decoded = metrics["rail"], metrics["decoded"]["pearson"]
    row = [Path(metrics["data"]).name, metrics["rationales"], metrics["n"], *(rail[name] for name in MEASURES)]
    row += [decoded, f"{metrics['no_score_sentence']} of {metrics['draws']}", f"{metrics['score_mass']:.3f}"]
    return {
        "row": row,
        "about": f"model {metrics['model']}, data {metrics['data']}, computed in {metrics['dtype']}, "
        f"{metrics['draws']} rationales",
        "picture": picture(report.judged(records, metrics["bins"])),
        "readings": [[name, *(own[m] for m in MEASURES)] for name, own in metrics["readings"].items()],
        "examples": examples(records),
    }


def examples(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Judgements that were best and worst, and those whose draws disagree most."""
    far = sorted(records, key=lambda r: abs(r["expected_score"] - r["label"]))
    spread = lambda r: max(d["expected_score"] for d in draws(r)) - min(d["expected_score"] for d in draws(r))  # noqa: E731
    several = [r for r in records if len(draws(r)) > 1]
    apart = sorted(several, key=spread, reverse=True)[:SHOWN]
    chosen = {"Nearest to the true score": far[:SHOWN], "Farthest from it": far[: -SHOWN - 1 : -1]}
    chosen["Rationales that disagree most"] = apart
    return {kind: [r | {"texts": [_shown(d) for d in draws(r)]} for r in rs] for kind, rs in chosen.items()}


def _shown(draw: dict[str, Any]) -> str:
    return f"{draw['rationale']}\n→ {draw['expected_score']:.2f}"


def generation(place: Path) -> dict[str, Any]:
    """What the page shows of generated rationales: how they are."""
    health = json.loads((place / HEALTH).read_text(encoding="utf-8"))
    rows = [["all", health["n"]], *health["faults"].items(), ["kept", health["kept"]]]
    for name in ("words", "words_annotated"):
        if health[name]:
            rows.append([f"{name}: quartiles", ", ".join(f"{value:g}" for value in health[name])])
    rows += [
        [f"own score, {name}", "undefined" if v is None else f"{v:.3f}"] for name, v in health["agreement"].items()
    ]
    return {"rows": rows, "about": f"model {health['model']}, data {health['data']}"}


def training(place: Path) -> dict[str, Any]:
    """What the page shows of a training: its curves."""
    return {"picture": picture(report.curves(place / "metrics.jsonl"))}


def picture(figure: Figure) -> str:
    """A figure as the address of an image that carries itself."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
