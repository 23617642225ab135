"""What lies beside a model's weights and config, and belongs to it: the files of its tokenizer or processor."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoProcessor

__all__ = ["copy_companions"]

# weights of any library, settings that the model writes itself, and what was told of other weights
_OTHER_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".png", ".md"}
_OTHER_NAMES = {"config.json", "generation_config.json", "pruning_plan.json", "pruning_report.json"}
_OTHER_NAMES |= {"trainer_state.json", "sparsity_report.json", "evaluations.json", "report.json", "deeparc_whole"}


def copy_companions(source: str, target: Path) -> None:
    """Put the files of a model's tokenizer or processor beside another one, as far as they are not there yet.

    Args:
        source: a folder, or a Hub id.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            other = file.suffix in _OTHER_SUFFIXES or file.name in _OTHER_NAMES or file.name.endswith(".index.json")
            if file.is_file() and not other and not (target / file.name).exists():
                shutil.copy2(file, target / file.name)
        return
    if any(target.glob("*token*")) or any(target.glob("*processor*")):
        return
    try:
        AutoProcessor.from_pretrained(source, trust_remote_code=False).save_pretrained(target)
    except (OSError, ValueError, ImportError, KeyError):  # it has none, or none that transformers knows
        return
