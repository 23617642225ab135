"""Accuracy, BLEU, ROUGE, METEOR and error rates by evaluate where it can load them, and by the libraries beneath it
elsewhere: the values are the same. Each is chosen once, before the run.

evaluate has no metric in it: each is a script, which `evaluate.load` fetches from the Hub and runs. No code from there
is run unless `evaluate_scripts=hub` asks for it. By default only scripts count that lie in evaluate's cache, because
somebody has used them on this machine before.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
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
    "wer": "jiwer",
    "cer": "jiwer",
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
        """What evaluate's metric gives; a lone number by the metric's name."""
        found = self._modules[name].compute(predictions=predictions, references=references, **settings)
        return dict(found) if isinstance(found, Mapping) else {name: found}

    def leave_out(self, name: str, reason: str) -> None:
        """Note that a metric is computed by nobody."""
        self._modules.pop(name, None)
        self.told[name] = f"left out, {reason.rstrip('.')}"

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
    offline = scripts == HUB and is_offline_mode()
    if scripts == HUB and not offline:
        place, whence = f"evaluate-metric/{name}", "its script from the Hub"
    elif scripts in (CACHE, HUB):
        kept = Path(evaluate.config.HF_MODULES_CACHE) / "evaluate_modules" / "metrics" / f"evaluate-metric--{name}"
        found = sorted(kept.glob(f"*/{name}.py"), key=lambda path: path.stat().st_mtime)
        more = "this machine is offline" if offline else "evaluate_scripts=hub fetches and runs it"
        if not found:
            return _without(name, f"evaluate's script is not in its cache; {more}", warns=offline)
        if name == "meteor":
            return _without(name, "evaluate's script would download data, which evaluate_scripts=hub lets it", offline)
        place, whence = str(found[-1]), f"its script from its cache, {_mark(found[-1].parent)}"
    else:
        folder = Path(scripts) / name
        if not (folder / f"{name}.py").is_file():
            return _without(name, f"the folder evaluate_scripts has no {name}/{name}.py", warns=True)
        place, whence = str(folder), f"its script from a folder, {_mark(folder)}"
    told = f"evaluate {evaluate.__version__}, {whence}"
    try:
        # in memory: processes would wait for each other at files
        module = evaluate.load(place, module_type="metric", keep_in_memory=True)
        if name in _TRIALS and not _TRIALS[name](module):
            return _without(name, f"{told}, gives other values on a trial", warns=True)
    except Exception as error:  # of a script that is not ours, the Hub and the connection
        logger.warning("evaluate could not load and try %s: %s", name, error)
        return None, f"{told}, cannot be loaded and tried, {type(error).__name__}"
    return module, told


def _without(name: str, why: str, warns: bool) -> tuple[None, str]:
    if warns:
        logger.warning("evaluate does not compute %s, but %s: %s.", name, BENEATH[name], why)
    return None, why


def _mark(folder: Path) -> str:
    """What tells scripts apart: the beginning of a hash of them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def _close(found: Any, wanted: Sequence[float]) -> bool:
    return all(math.isclose(float(one), other, abs_tol=1e-9) for one, other in zip(found, wanted, strict=True))


def _bleu(module: Any) -> bool:
    text = "what is the capital of France ?"
    found = module.compute(predictions=[text, "who ?"], references=[text, "who wrote it ?"], max_order=4, smooth=False)
    # 9 tokens for 11; all n-grams are there
    parts = [*found["precisions"], found["length_ratio"], found["brevity_penalty"], found["bleu"]]
    penalty = math.exp(1 - 11 / 9)
    return _close(parts, [1.0, 6 / 7, 1.0, 1.0, 9 / 11, penalty, penalty * (6 / 7) ** 0.25])


def _rouge(module: Any) -> bool:
    kinds = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    found = module.compute(
        predictions=["a b", "c"], references=["a b", "d"], rouge_types=kinds, use_stemmer=False, use_aggregator=False
    )
    return all(_close(found[kind], [1.0, 0.0]) for kind in kinds)


def _accuracy(module: Any) -> bool:
    return _close([module.compute(predictions=[0, 1, 2, 1], references=[0, 1, 1, 1])["accuracy"]], [0.75])


def _errors(module: Any, wanted: float) -> bool:
    # two of four words are wrong; one of five characters, and of the other five one is wrong and one is added
    found = module.compute(predictions=["ab cx", "def gh"], references=["ab cd", "def i"])
    return _close([found], [wanted])


# by metric, whether it gives on a small example what it should. METEOR needs data, and is asked only where they are
_TRIALS: dict[str, Callable[[Any], bool]] = {"accuracy": _accuracy, "bleu": _bleu, "rouge": _rouge}
_TRIALS |= {"wer": partial(_errors, wanted=0.5), "cer": partial(_errors, wanted=0.3)}
