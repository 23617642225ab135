r"""How much memory does surgery on a checkpoint's files take, beside its largest file, and how long?

    python -m benchmarks.disk_surgery --gigabytes 8 --shards 4 --folder FOLDER

A Llama with random weights is written to the folder (and left there), then `deeparc remove` takes a quarter of its
blocks out in a process of its own, with and without its verification. Peak memory is that of the whole process with its
libraries, pages of files included. A copy of the files is timed beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from deeparc_hf.core.environment import hardware, package_versions

_WIDTH, _VOCABULARY = 2560, 32000
_MEASURE = """
import re, sys
from deeparc_hf.cli import main
code = main(sys.argv[1:])
# of this process alone: getrusage would count what its parent had
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]), file=sys.stderr)
sys.exit(code)
"""


def write_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """A checkpoint of about this size in as many files; the number of its blocks."""
    sizes = {"hidden_size": _WIDTH, "intermediate_size": 4 * _WIDTH, "vocab_size": _VOCABULARY, "pad_token_id": 0}
    heads = {"num_attention_heads": _WIDTH // 128, "num_key_value_heads": _WIDTH // 128}
    a_block = 16 * _WIDTH**2 * 2
    blocks = max(4, round((gigabytes * 1e9 - 2 * _VOCABULARY * _WIDTH * 2) / a_block))
    config = LlamaConfig(
        **sizes, **heads, num_hidden_layers=blocks, dtype="bfloat16", architectures=["LlamaForCausalLM"]
    )
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in LlamaForCausalLM(config).to(torch.bfloat16).state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    keys, places = list(shapes), {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[number * len(keys) // shards : (number + 1) * len(keys) // shards]
        tensors = {key: torch.empty(shapes[key], dtype=torch.bfloat16).normal_(0, 0.02) for key in part}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(part, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return blocks


def copy_of(folder: Path) -> float:
    """Seconds that a copy of the files takes."""
    other = folder.with_name("copy")
    start = time.perf_counter()
    shutil.copytree(folder, other)
    seconds = time.perf_counter() - start
    shutil.rmtree(other)
    return seconds


def surgery(folder: Path, out: Path, blocks: int, *options: str) -> tuple[float, int]:
    """Seconds and peak memory in bytes of a removal of each fourth block."""
    shutil.rmtree(out, ignore_errors=True)
    gone = ",".join(map(str, range(2, blocks, 4)))
    command = ["remove", str(folder), "--blocks", f"model.layers={gone}", "-o", str(out), *options]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], check=True, stderr=subprocess.PIPE, text=True)
    return time.perf_counter() - start, int(done.stderr.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    source, out = args.folder / "whole", args.folder / "smaller"
    blocks = write_checkpoint(source, args.gigabytes, args.shards)
    sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
    copied = copy_of(source)
    print(f"{blocks} blocks, {sum(sizes) / 1e9:.2f} GB in {len(sizes)} files, the largest of {max(sizes) / 1e9:.2f} GB")
    print(f"a copy: {copied:.0f} s")
    bound = 1.5 * max(sizes) + 300e6
    for what, options in (("without verification", ["--no-verify"]), ("with verification", [])):
        seconds, peak = surgery(source, out, blocks, *options)
        print(f"{what}: {seconds:.0f} s, at most {peak / 1e9:.2f} GB of memory (bound: {bound / 1e9:.2f} GB)")
    print(json.dumps({**hardware(), **package_versions()}))


if __name__ == "__main__":
    main()
