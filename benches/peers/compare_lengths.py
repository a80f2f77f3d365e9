"""Times training steps on one long text in turn, side by side: burn-lora, plain and in segments, and PEFT, plain and
with gradient checkpointing, on the same files in f32: a model of the size of SmolLM2-135M with random weights. Prints a
table in Markdown, and draws how the time of a step grows.

    python -m venv env && env/bin/pip install torch==2.15.0 peft==0.21.2 transformers==5.24.0
    cargo build --release --bin long_text --no-default-features --features flex
    env/bin/python compare_lengths.py target/release [--plot FILE.svg] [LENGTH ...]

Each program is started anew for its turn, as the largest do not fit into memory together. The peak is that of the steps,
without what reading the model took.
"""

import sys
import tempfile
from pathlib import Path

arguments = sys.argv[1:]
plot = None
if "--plot" in arguments:
    at = arguments.index("--plot")
    plot = Path(arguments[at + 1])
    del arguments[at:at + 2]
sys.argv[1:] = arguments[:1]

from compare import THREADS, Peer, binaries  # it reads the command line
from compare_models import peak

LENGTHS = [int(length) for length in arguments[1:]] or [512, 1024, 2048, 4096]
# Several texts, of so many tokens. burn-lora shares them among workers, one for each core.
MANY = (4, 512)
ROUNDS = 2
HERE = Path(__file__).parent


def write_model(directory):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, tie_word_embeddings=True, max_position_embeddings=8192,
    )).save_pretrained(directory)


def ways(directory, texts, length):
    size = [str(directory), str(length), str(texts)]
    own, peft = [str(binaries / "long_text"), *size], [sys.executable, str(HERE / "peft_long.py"), *size]
    workers = THREADS if texts > 1 else "1"
    keeps = {"MIMALLOC_PURGE_DELAY": "-1", "WARM_UP": "1"}
    return {
        "burn-lora": ([*own, workers, "plain"], keeps),
        "burn-lora, segments": ([*own, workers, "segments"], keeps),
        "PEFT": ([*peft, "plain"], {"WARM_UP": "1"}),
        "PEFT, checkpointing": ([*peft, "checkpointing"], {"WARM_UP": "1"}),
    }


def turn(command, variables, steps):
    """The seconds of some steps, and the most memory they had, in MiB."""
    peer = Peer(command, variables, ())
    # From here on the peak counts anew.
    Path(f"/proc/{peer.process.pid}/clear_refs").write_text("5")
    times = peer.steps(steps)
    most = peak(peer.process)
    peer.stop()
    return times, most


def compare(directory, texts, length):
    """The tokens per second in the fastest step, and the peak in MiB, by program. Other tenants of a machine make steps
    slower, and nothing makes them faster."""
    chosen = ways(directory, texts, length)
    times, peaks = {name: [] for name in chosen}, {name: 0 for name in chosen}
    for _ in range(ROUNDS):
        for name, how in chosen.items():
            # Those of long texts take half a minute.
            seconds, most = turn(*how, 2 if texts * length <= 1024 else 1)
            times[name] += seconds
            peaks[name] = max(peaks[name], most)
    return {name: (texts * length / min(times[name]), peaks[name]) for name in chosen}


def draw(found, file):
    """A chart of the seconds of a step by the length of the text."""
    names, width, height, left, top = list(next(iter(found.values()))), 560, 340, 60, 30
    seconds = {name: [(n, n / rates[name][0]) for n, rates in found.items()] for name in names}
    longest, most = max(found), max(s for line in seconds.values() for _, s in line)
    place = lambda n, s: (left + n / longest * (width - left - 20), height - 50 - s / most * (height - 50 - top))
    colors = ["#0072b2", "#56b4e9", "#d55e00", "#e69f00"]
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
             f'font-size="12"><rect width="{width}" height="{height}" fill="white"/>',
             f'<text x="{left}" y="18">seconds of a step, by tokens of one text (SmolLM2-135M, f32)</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = place(longest, most * share)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="#ddd"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{most * share:.0f}</text>')
    for n in found:
        x, y = place(n, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{n:,}</text>')
    for index, (name, color) in enumerate(zip(names, colors)):
        line = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in [(0, 0), *seconds[name]])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = top + 16 + 17 * index
        parts.append(f'<line x1="{left + 14}" y1="{y - 4}" x2="{left + 34}" y2="{y - 4}" stroke="{color}" '
                     f'stroke-width="2"/><text x="{left + 40}" y="{y}">{name}</text>')
    file.write_text("\n".join([*parts, "</svg>"]) + "\n")


def main():
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory)
        print("| texts, tokens | program | tokens/s | of PEFT's | peak, MiB | of PEFT's |")
        print("|---|---|---:|---:|---:|---:|")
        for texts, length in [*((1, length) for length in LENGTHS), *([MANY] if not arguments[1:] else [])]:
            rates = compare(directory, texts, length)
            if texts == 1:
                found[length] = rates
            for name, (rate, most) in rates.items():
                peer = "PEFT, checkpointing" if name.endswith("segments") else "PEFT"
                print(f"| {texts} x {length} | {name} | {rate:.0f} | {rate / rates[peer][0]:.2f} | {most:.0f} | "
                      f"{most / rates[peer][1]:.2f} |", flush=True)
    print(f"\nThe fastest of {ROUNDS} turns each, {THREADS} threads. burn-lora in segments is compared with PEFT "
          "with checkpointing.")
    if plot:
        draw(found, plot)


if __name__ == "__main__":
    main()
