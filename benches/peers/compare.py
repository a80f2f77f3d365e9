"""Times training steps of a linear layer in turn, side by side: burn-lora, the LoRA built into
Burn 0.22, candle with peft-rs, and PEFT on PyTorch; and of four layers, with burn-lora and candle. Prints
tables in Markdown.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2
    cargo build --release
    env/bin/python compare.py target/release

PEFT runs twice: as it comes, and with the C library's allocator told to keep its pages, which is what
mimalloc does for the Rust programs.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

# Tokens, width and rank.
SHAPES = [(64, 784, 8), (256, 1024, 8), (512, 768, 8), (512, 4096, 8), (2048, 1024, 16)]
ROUNDS, WARM_UP, STEPS = 15, 2, 5
THREADS = str(os.cpu_count())
SAME_THREADS = {
    name: THREADS
    for name in ["RAYON_NUM_THREADS", "MATMUL_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"]
}
KEEP_PAGES = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "100000000",
}

binaries = Path(sys.argv[1])
peft = [sys.executable, str(Path(__file__).with_name("peft_step.py"))]
PEERS = {
    "burn-lora": ([str(binaries / "burn_lora"), "lora"], {}),
    "full, Burn 0.21": ([str(binaries / "burn_lora"), "full"], {}),
    "Burn 0.22 `apply_lora`": ([str(binaries / "burn_next"), "lora"], {}),
    "candle, peft-rs": ([str(binaries / "candle_peft"), "lora"], {}),
    "PEFT": ([*peft, "lora"], {}),
    "PEFT, keeping pages": ([*peft, "lora"], KEEP_PAGES),
    "full, PyTorch": ([*peft, "full"], {}),
}
MLP = {
    "burn-lora": ([str(binaries / "burn_lora"), "mlp"], {}),
    "candle, peft-rs": ([str(binaries / "candle_peft"), "mlp"], {}),
}


class Peer:
    def __init__(self, command, variables, shape):
        environment = {**os.environ, **SAME_THREADS, **variables}
        self.process = subprocess.Popen(
            [*command, *map(str, shape)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        answer = self.process.stdout.readline()
        assert answer.startswith("ready"), f"{command}: {answer!r}"

    def steps(self, count):
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return [float(seconds) for seconds in self.process.stdout.readline().split()]

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def compare(ways, shape):
    """The median seconds of a step, by peer."""
    peers = {name: Peer(*how, shape) for name, how in ways.items()}
    times = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, peer in peers.items():
            # The first steps of a turn find cold caches and sleeping threads.
            times[name] += peer.steps(WARM_UP + STEPS)[WARM_UP:]
            # Idle threads of the last program spin for a while before they sleep.
            time.sleep(0.05)
    for peer in peers.values():
        peer.stop()
    return {name: statistics.median(values) for name, values in times.items()}


def table(ways, shapes):
    names = list(ways)
    print("| tokens, width, rank | burn-lora, ms | " + " | ".join(names[1:]) + " |")
    print("|---" * (len(names) + 1) + "|")
    for shape in shapes:
        times = compare(ways, shape)
        own = times["burn-lora"]
        cells = [f"{1e3 * own:.2f}"] + [f"{own / times[name]:.2f}" for name in names[1:]]
        print(f"| {', '.join(map(str, shape))} | " + " | ".join(cells) + " |", flush=True)


def main():
    table(PEERS, SHAPES)
    print("\nFour layers, with ReLU between them:\n")
    table(MLP, SHAPES[1:3])
    print(f"\nMedians of {ROUNDS * STEPS} steps in turn, {THREADS} threads; "
          "ratios are burn-lora's time over the peer's.")


if __name__ == "__main__":
    main()
