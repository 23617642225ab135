"""Accuracy, BLEU, ROUGE and METEOR by evaluate where it can load them, and by the libraries beneath it elsewhere: the
values are the same. Each is chosen once, before the run.

evaluate has no metric in it: each is a script, which `evaluate.load` fetches from the Hub and runs. No code from there
is run unless `evaluate_scripts=hub` asks for it. By default only scripts count that lie in evaluate's cache, because
somebody has used them on this machine before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from deeparc_hf.core.distributed import gather
from deeparc_hf.errors import ConfigError

__all__ = ["BENEATH", "CACHE", "HUB", "OFF", "Accuracy", "Metrics"]

logger = logging.getLogger(__name__)

CACHE, HUB, OFF = "cache", "hub", "off"
BENEATH = {
    "accuracy": "the share of right answers",
    "bleu": "sacrebleu",
    "rouge": "rouge_score",
    "meteor": "nltk",
}


class Metrics:
    """The metrics of an experiment, chosen once: all processes take the same.

    Args:
        names: of evaluate's metrics, keys of `BENEATH`.
        scripts: where evaluate's scripts may come from: "cache" (those that it has kept of an earlier use), "hub"
            (fetched from the Hub, and run), "off" (none), or a folder with NAME/NAME.py for each.

    Attributes:
        told: name -> what computes it, and why not evaluate, for the report.

    Raises:
        ConfigError: if `scripts` is none of these.
    """

    def __init__(self, names: Iterable[str] = (), scripts: str = CACHE) -> None:
        if scripts not in (CACHE, HUB, OFF) and not Path(scripts).is_dir():
            raise ConfigError(
                f"evaluate_scripts must be {CACHE}, {HUB}, {OFF}, or a folder with NAME/NAME.py for each metric, found "
                f"{scripts!r}."
            )
        self._modules: dict[str, Any] = {}
        self.told: dict[str, str] = {}
        for name in names:
            module, told = _loaded(name, scripts)
            others = gather(lambda told=told, here=module is not None: (here, told))  # type: ignore[misc]
            if all(here for here, _ in others):
                self._modules[name], self.told[name] = module, told
            else:
                why = next(told for here, told in others if not here)
                self.told[name] = f"{BENEATH[name]} ({why})"

    def __contains__(self, name: object) -> bool:
        """Whether evaluate computes this one."""
        return name in self._modules

    def compute(self, name: str, predictions: Any, references: Any, **settings: Any) -> Mapping[str, Any]:
        """What evaluate's metric gives."""
        found = self._modules[name].compute(predictions=predictions, references=references, **settings)
        return dict(found)

    def __str__(self) -> str:
        return "Computed by: " + "; ".join(f"{name}: {told}" for name, told in self.told.items()) + "."


class Accuracy:
    """The share of right answers, for compute_metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def __call__(self, prediction: Any) -> dict[str, float]:
        found, wanted = prediction.predictions.argmax(-1), prediction.label_ids
        if "accuracy" in self._metrics:
            return {"accuracy": float(self._metrics.compute("accuracy", found, wanted)["accuracy"])}
        return {"accuracy": float((found == wanted).mean())}


def _loaded(name: str, scripts: str) -> tuple[Any, str]:
    """evaluate's metric and what it is, or None and why there is none. Reasons name no place of this machine."""
    if scripts == OFF:
        return None, "evaluate_scripts is off"
    try:
        import evaluate
    except ImportError:
        return None, 'evaluate is not installed: pip install "deeparc_hf[recipes]"'
    version = f"evaluate {evaluate.__version__}"
    if scripts == HUB and not is_offline_mode():
        place, whence = f"evaluate-metric/{name}", "its script from the Hub"
    elif scripts in (CACHE, HUB):
        kept = Path(evaluate.config.HF_MODULES_CACHE) / "evaluate_modules" / "metrics" / f"evaluate-metric--{name}"
        found = sorted(kept.glob(f"*/{name}.py"), key=lambda path: path.stat().st_mtime)
        if not found:
            return None, "evaluate's script is not in its cache; evaluate_scripts=hub fetches and runs it"
        if name == "meteor":
            return None, "evaluate's script would download data; evaluate_scripts=hub lets it"
        place, whence = str(found[-1]), "its script from its cache"
    else:
        if not (Path(scripts) / name / f"{name}.py").is_file():
            return None, f"the folder evaluate_scripts has no {name}/{name}.py"
        place, whence = str(Path(scripts) / name), "its script from a folder"
    try:
        # in memory: processes would wait for each other at files
        return evaluate.load(place, module_type="metric", keep_in_memory=True), f"{version}, {whence}"
    except Exception as error:  # of a script that is not ours, the Hub and the connection
        logger.warning("evaluate could not load %s: %s", name, error)
        return None, f"{version} could not load its script, {type(error).__name__}"
