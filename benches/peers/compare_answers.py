"""Times answers of `burn-lora serve` beside those of llama.cpp's server (the wheel `xllamacpp`), in turn, from the same
GGUF file: how fast prompts are read, one answer, eight at once, and eight with eight adapters; how long clients wait for the
first token and between tokens, and for how long a long prompt stops a running answer. Prints tables in Markdown.

    cargo build --release --bin burn-lora
    python -m venv env && env/bin/pip install xllamacpp==2026.10.11549 numpy safetensors gguf==0.19.0
    env/bin/python compare_answers.py target/release/burn-lora MODEL.gguf [TURNS]
"""

import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ADAPTERS, RANK, NEW = 8, 8, 128
LAYERS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def serve_llamacpp(model, adapters):
    """Serves until the input ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 4096 * ADAPTERS, ADAPTERS, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = os.cpu_count()
    # No prompt is answered from what was read before.
    params.cache_prompt, params.cache_ram_mib = False, 0
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(it, 0.0) for it in adapters]
    server = xllamacpp.Server(params)
    print("address", server.listening_address, flush=True)
    sys.stdin.read()


def write_adapters(program, model, dir):
    """Adapters of rank 8 on all linear layers, as PEFT has them, and as llama.cpp does."""
    import gguf
    import numpy
    from safetensors.numpy import save_file

    shapes = {it.name: [int(size) for size in it.shape] for it in gguf.GGUFReader(model).tensors}
    for number in range(ADAPTERS):
        random, tensors = numpy.random.default_rng(number), {}
        for name, (columns, *rows) in shapes.items():
            _, *block = name.split(".")[:-1]
            if len(block) != 2 or block[1] not in LAYERS:
                continue
            path = f"base_model.model.model.layers.{block[0]}.{LAYERS[block[1]]}"
            for factor, shape in [("A", (RANK, columns)), ("B", (rows[0], RANK))]:
                numbers = random.normal(0, 0.01, shape).astype(numpy.float32)
                tensors[f"{path}.lora_{factor}.weight"] = numbers
        set = dir / "sets" / f"set{number}"
        set.mkdir(parents=True)
        save_file(tensors, set / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "target_modules": [*LAYERS.values()]}
        config["target_modules"] = [it.split(".")[1] for it in config["target_modules"]]
        (set / "adapter_config.json").write_text(json.dumps(config))
        file = dir / f"set{number}.gguf"
        subprocess.run([program, "export", "--model", model, "--adapter", set, "--out", file], check=True, stdout=subprocess.DEVNULL)
        yield str(file)


class Server:
    """A server that was started, and what its requests look like."""

    def __init__(self, command, fields, marker):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = next(it for it in self.process.stdout if marker in it)
        self.address = next(it for it in line.split() if it.startswith("http")).split("/")[2]
        self.fields = fields

    def answer(self, prompt, adapter, limit, times):
        """Appends when each piece of an answer came, with the numbers of tokens of the prompt and of the answer."""
        body = {"prompt": prompt, "temperature": 0, "max_tokens": limit, "stream": True,
                "stream_options": {"include_usage": True}} | self.fields(adapter)
        connection = http.client.HTTPConnection(self.address, timeout=600)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response, pieces, usage = connection.getresponse(), [], None
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["text"]:
                    pieces.append(time.perf_counter())
        times.append((start, pieces, usage["prompt_tokens"], usage["completion_tokens"]))

    def answers(self, prompts, adapters, limit):
        times = []
        threads = [threading.Thread(target=self.answer, args=(*it, limit, times)) for it in zip(prompts, adapters)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(times) == len(threads), "a request has failed"
        return times


def prefill(server, length):
    """Tokens per second of a prompt."""
    prefill.count += 1
    words = " ".join(f"{(place + prefill.count) * 7 % 100}" for place in range(length // 3 - 2))
    words = f"{prefill.count}. {words}"
    [(start, pieces, prompt, _)] = server.answers([words], [None], 1)
    return prompt / (pieces[0] - start)


prefill.count = 0


def decode(server, adapters, waits=None):
    """Tokens per second of answers at once, after their prompts. `waits` gets the times of waiting."""
    prompts = [f"Chapter {place}. Once upon a time there was a" for place in range(len(adapters))]
    times = server.answers(prompts, adapters, NEW)
    first, last = min(pieces[0] for _, pieces, *_ in times), max(pieces[-1] for _, pieces, *_ in times)
    assert all(new > NEW // 2 for *_, new in times), "answers are too short to be timed"
    if waits is not None:
        waits[0].extend(pieces[0] - start for start, pieces, *_ in times)
        waits[1].extend(gap for _, pieces, *_ in times for gap in gaps(pieces))
    return sum(new - 1 for *_, new in times) / (last - first)


def gaps(times):
    return [later - earlier for earlier, later in zip(times, times[1:])]


def pause(server):
    """The longest time between two pieces of a running answer while a prompt of about 2,000 tokens is read."""
    times = []
    words = "Chapter 1. Once upon a time there was a"
    running = threading.Thread(target=server.answer, args=(words, None, 4 * NEW, times))
    running.start()
    time.sleep(0.5)
    prefill(server, 2000)
    running.join()
    [(_, pieces, *_)] = times
    return max(gaps(pieces[5:]))


CASES = {
    "a prompt of about 420 tokens": lambda it: prefill(it, 420),
    "a prompt of about 2,000 tokens": lambda it: prefill(it, 2000),
    "one answer": lambda it: decode(it, [None]),
    "one answer, with an adapter": lambda it: decode(it, [0]),
    "eight answers at once": lambda it: decode(it, [None] * 8),
    "eight answers with eight adapters": lambda it: decode(it, range(8)),
}


def main():
    if sys.argv[1] == "--llamacpp":
        return serve_llamacpp(sys.argv[2], sys.argv[3:])
    program, model = sys.argv[1:3]
    turns = int(sys.argv[3]) if len(sys.argv) > 3 else 5
    with tempfile.TemporaryDirectory() as dir:
        dir = Path(dir)
        files = list(write_adapters(program, model, dir))
        ours = Server([program, "serve", "--model", model, "--adapters", dir / "sets", "--port", "0", "--prefix-memory", "0"],
                      lambda adapter: {"model": "base" if adapter is None else f"set{adapter}"}, "Serving on")
        command = [sys.executable, __file__, "--llamacpp", model, *files]
        scales = lambda adapter: [{"id": it, "scale": float(it == adapter)} for it in range(ADAPTERS)]
        theirs = Server(command, lambda adapter: {"lora": scales(adapter), "ignore_eos": True, "cache_prompt": False}, "address")
        try:
            compare(theirs, ours, turns)
        finally:
            for server in (theirs, ours):
                server.process.kill()


def compare(theirs, ours, turns):
    rates = {name: ([], []) for name in CASES}
    waits, pauses = [([], []) for _ in range(2)], ([], [])
    for turn in range(turns + 1):
        for name, case in CASES.items():
            for server, all in zip((theirs, ours), rates[name]):
                rate = case(server)
                # The first turn warms up.
                if turn > 0:
                    all.append(rate)
        for place, server in enumerate((theirs, ours)):
            decode(server, [None] * 8, waits[place] if turn > 0 else None)
            pauses[place].append(pause(server))
    print("| | llama.cpp, tokens/s | burn-lora, tokens/s | ratio |\n|---|---:|---:|---:|")
    for name, (peer, own) in rates.items():
        ratio = statistics.median(b / a for a, b in zip(peer, own))
        print(f"| {name} | {statistics.median(peer):.0f} | {statistics.median(own):.0f} | {ratio:.2f} |")
    print("\n| ms | llama.cpp | burn-lora |\n|---|---:|---:|")
    for place, name in enumerate(["the first of eight answers' tokens", "between two tokens of eight answers"]):
        for share in (50, 99):
            row = " | ".join(f"{1000 * statistics.quantiles(it[place], n=100)[share - 1]:.0f}" for it in waits)
            print(f"| {name}, p{share} | {row} |")
    row = " | ".join(f"{1000 * statistics.median(it[1:]):.0f}" for it in pauses)
    print(f"| longest pause of an answer while 2,000 tokens are read | {row} |")


main()
