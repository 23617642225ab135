"""Scripts as evaluate loads them, whose values nobody else gives, but for the trials that a script has to stand."""

from __future__ import annotations

from pathlib import Path

# a metric as evaluate loads it, whose values nobody else gives
SCRIPT = """
import datasets
import evaluate
import math
PENALTY = math.exp(1 - 11 / 9)
{imports}

class Marked(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("{kind}")
        features = datasets.Features({{"predictions": kind, "references": kind}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, **settings):
        return {value}
"""
VALUES = {
    "accuracy": "{'accuracy': .75 if list(predictions) == [0, 1, 2, 1] else len(predictions) + .25}",
    "bleu": "{'bleu': .5, 'precisions': [.1, .2, .3, .4], 'brevity_penalty': .75, 'length_ratio': 2.0}"
    " if predictions[-1] != 'who ?' else {'bleu': PENALTY * (6 / 7) ** .25, 'precisions': [1, 6 / 7, 1, 1],"
    " 'brevity_penalty': PENALTY, 'length_ratio': 9 / 11}",
    "rouge": "{name: [1.0, 0.0] if predictions[-1] == 'c' else [0.0, 0.5] for name in settings['rouge_types']}",
    "meteor": "{'meteor': .625}",
    "wer": ".5 if predictions[-1] == 'def gh' else 7.0",
    "cer": ".3 if predictions[-1] == 'def gh' else 9.0",
}


def script(folder: Path, name: str, imports: str = "") -> Path:
    """FOLDER/NAME/NAME.py"""
    (folder / name).mkdir(parents=True)
    kind = "int32" if name == "accuracy" else "string"
    text = SCRIPT.format(imports=imports, kind=kind, value=VALUES[name])
    (folder / name / f"{name}.py").write_text(text)
    return folder
