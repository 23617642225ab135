r"""A model whose blocks accelerate keeps on the disk, beside the same in memory: how much memory and time do comparing,
pruning with repairs and sequential Wanda take, and are the results equal?

    python -m benchmarks.offloaded --gigabytes 4 --folder FOLDER

A Llama with random weights (1,024 wide, float32) is written to the folder, and left there. Each way runs in a process
of its own; peak memory is that of the whole process with its libraries, pages of files included.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from deeparc_hf import analyze, find_stacks, prune_model, sparsify_model
from deeparc_hf.core.environment import hardware, package_versions
from deeparc_hf.core.offload import blocks_on_disk

WAYS = ("disk", "memory")
_BATCHES, _SIZE, _LENGTH, _REMOVED = 4, 4, 24, 4


def write_checkpoint(folder: Path, gigabytes: float) -> None:
    width = 1024
    a_block = 4 * (4 * width**2 + 3 * width * 2 * width)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 8, "vocab_size": 2000}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=max(8, round(gigabytes * 1e9 / a_block)), pad_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.03)
    model.save_pretrained(folder, max_shard_size="500MB")


def peak() -> int:
    """Bytes of memory that this process has taken at most."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def measure(folder: Path, offloaded: bool, out: Path) -> None:
    """Do all three, print seconds and peak memory of each, and keep the results."""
    torch.set_num_threads(1)
    inputs = [
        {"input_ids": torch.randint(1, 2000, (_SIZE, _LENGTH), generator=torch.Generator().manual_seed(seed))}
        for seed in range(_BATCHES)
    ]
    settings = {}
    if offloaded:
        with torch.device("meta"):
            frame = LlamaForCausalLM(AutoConfig.from_pretrained(folder))
        settings = {"device_map": blocks_on_disk(frame, list(find_stacks(frame))), "offload_folder": str(out / "other")}
    model = LlamaForCausalLM.from_pretrained(folder, **settings).eval()
    print(f"loaded: at most {peak() / 1e9:.2f} GB", flush=True)
    start = time.perf_counter()

    def tell(what: str) -> None:
        nonlocal start
        print(f"{what}: {time.perf_counter() - start:.1f} s, at most {peak() / 1e9:.3f} GB", flush=True)
        start = time.perf_counter()

    blocks = model.config.num_hidden_layers
    plan = analyze(model, inputs, num_blocks=blocks - _REMOVED, progress=False)
    tell("compared")
    prune_model(model, inputs, num_blocks=blocks - _REMOVED, heal="lstsq", progress=False)
    tell("pruned with repairs")
    sparsify_model(model, inputs, progress=False)
    tell("zeroed")
    with torch.no_grad():
        logits = model(**inputs[0]).logits
    torch.save(logits, out / "logits.pt")
    known = {"plan": plan.to_dict(), "record": model.config.pruning_config}
    known["record"]["iterations"][0].pop("left", None)  # weights that lie elsewhere are not marked
    (out / "known.json").write_text(json.dumps(known))


def run(folder: Path, way: str) -> dict[str, tuple[float, float]]:
    """Do all three in a process of its own: of each, seconds and the most bytes of memory until then."""
    program = [sys.executable, "-m", "benchmarks.offloaded", "--folder", str(folder), "--way", way]
    told = subprocess.run(program, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = re.findall(r"^(.+): ([\d.]+) s, at most ([\d.]+) GB$", told, re.MULTILINE)
    return {what: (float(seconds), 1e9 * float(most)) for what, seconds, most in lines}


def alike(folder: Path) -> bool:
    """Whether both ways gave the same plan, repairs, zeros and outputs."""
    known = {(folder / way / "known.json").read_text() for way in WAYS}
    return len(known) == 1 and torch.equal(*(torch.load(folder / way / "logits.pt", weights_only=True) for way in WAYS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--way", choices=WAYS, help="only one of them, in this process")
    args = parser.parse_args()
    whole = args.folder / "whole"
    if args.way is not None:
        out = args.folder / args.way
        shutil.rmtree(out, ignore_errors=True)
        (out / "other").mkdir(parents=True)
        measure(whole, args.way == "disk", out)
        shutil.rmtree(out / "other")
        return
    if not whole.exists():
        write_checkpoint(whole, args.gigabytes)
    print(f"{sum(file.stat().st_size for file in whole.glob('*.safetensors')) / 1e9:.2f} GB of weights")
    for way in WAYS:
        for what, (seconds, most) in run(args.folder, way).items():
            print(f"{way}, {what}: {seconds:.0f} s, at most {most / 1e9:.2f} GB", flush=True)
    print(f"plans, repairs, zeros and outputs equal: {alike(args.folder)}")
    print(json.dumps({**hardware(), **package_versions()}))


if __name__ == "__main__":
    main()
