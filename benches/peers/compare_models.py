"""Times training steps of whole models in turn, side by side: burn-lora with one worker, with one for each
core, and in segments, and PEFT on PyTorch. Prints a table in Markdown.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0
    cargo build --release --bin whole_model --no-default-features --features flex
    env/bin/python compare_models.py target/release
"""

import statistics
import sys
import time
from pathlib import Path

from compare import KEEP_PAGES, THREADS, Peer, binaries

ROUNDS, WARM_UP = 5, 1
# The multiplications of a forward pass by weights. A LoRA step passes gradients on as well, and full
# fine-tuning also computes those of the weights.
MULTIPLICATIONS = {
    "minilm": 32 * 32 * 6 * (4 * 384**2 + 2 * 384 * 1536),
    "smollm2": 4 * 128 * (30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536) + 49152 * 576),
    "resnet": 32 * (
        1024 * (27 * 32 + 4 * 9 * 32**2)
        + 256 * (9 * 32 * 64 + 3 * 9 * 64**2 + 32 * 64)
        + 64 * (9 * 64 * 128 + 3 * 9 * 128**2 + 64 * 128)
    ),
    "conv": 32 * 1024 * 9 * 64**2,
}
PASSES = {"lora": 2, "full": 3}
STEPS = {"minilm": 5, "smollm2": 2, "resnet": 5, "conv": 15}
KEEPS = {"MIMALLOC_PURGE_DELAY": "-1"}

# A product of two matrices of 1024 x 1024, at whose speed the products of a step are counted.
PRODUCT = "product"

peft = [sys.executable, str(Path(__file__).with_name("peft_model.py"))]
whole = [str(binaries / "whole_model")]


def peers(model, method):
    ways = {
        "burn-lora, workers": ([*whole, model, method, THREADS, "plain"], KEEPS),
        "burn-lora, 1 worker": ([*whole, model, method, "1", "plain"], KEEPS),
        "PEFT": ([*peft, model, method], {}),
        "PEFT, keeping pages": ([*peft, model, method], KEEP_PAGES),
    }
    if method == "lora" and model in ("minilm", "smollm2"):
        ways["burn-lora, segments"] = ([*whole, model, method, "1", "segments"], KEEPS)
    ways[PRODUCT] = ([*whole, "product", "1024x1024x1024", "1", "plain"], KEEPS)
    return ways


def peak(process):
    """The most memory that a process had at once, in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def compare(model, method):
    """The median seconds of a step and the peak memory, by peer."""
    running = {name: Peer(*how, ()) for name, how in peers(model, method).items()}
    times = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, peer in running.items():
            times[name] += peer.steps(WARM_UP + STEPS[model])[WARM_UP:]
            # Idle threads of the last program spin for a while before they sleep.
            time.sleep(0.05)
    peaks = {name: peak(peer.process) for name, peer in running.items()}
    for peer in running.values():
        peer.stop()
    return {name: (statistics.median(values), peaks[name]) for name, values in times.items()}


def main():
    print("| model, method | program | s | of PEFT | products | peak, MiB |")
    print("|---|---|---:|---:|---:|---:|")
    for model in sys.argv[2:] or STEPS:
        for method in ("lora", "full"):
            found = compare(model, method)
            large, _ = found.pop(PRODUCT)
            products = large * PASSES[method] * MULTIPLICATIONS[model] / 1024**3
            for name, (seconds, memory) in found.items():
                ratio, share = seconds / found["PEFT"][0], products / seconds
                print(f"| {model}, {method} | {name} | {seconds:.3f} | {ratio:.2f} | {share:.0%} | {memory:.0f} |",
                      flush=True)
    print(f"\nMedians of {ROUNDS} rounds in turn, {THREADS} threads. `products` is the share of the time that "
          "the products with the weights would take at the speed of burn-lora's large products.")


if __name__ == "__main__":
    main()
