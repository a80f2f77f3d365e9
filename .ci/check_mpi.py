"""Trains over MPI in all the ways that docs/data-parallel.md promises, with processes on one machine and on four.

Usage: check_mpi.py DIRECTORY-OF-EXAMPLES OUTPUT

The four machines are network namespaces with addresses of their own, between which nothing is shared but TCP. Where
they cannot be made, TCP on this machine takes their place.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from array import array
from pathlib import Path

from jobs import end_when_terminated, run, started

end_when_terminated()
programs, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
out.mkdir(parents=True)
os.environ |= {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Each process has a core, and its operations one thread; there may be more processes than cores.
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "RAYON_NUM_THREADS": "1",
}
steps = ["--generated", "--steps", "20", "--batch", "64"]


def run_quietly(command):
    """What it printed, or nothing if there is no such command."""
    try:
        return subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def mpirun(count, *arguments, options=()):
    code, text = run(["mpirun", *options, "-n", count, *arguments])
    # mpirun gives its processes a terminal, and is itself in a pipe: nothing may move there.
    assert not {"\r", "\x1b"} & set(text.replace("\r\n", "\n")), f"something moves: {text!r}"
    return code, text


def trained(name, count, options=(), arguments=()):
    """The summary and the adapters of the example `data_parallel`, on so many processes, or threads if negative."""
    where, program = out / name, programs / "data_parallel"
    if count < 0:
        code, _ = run([program, *steps, "--replicas", -count, "--out", where, *arguments])
    else:
        code, _ = mpirun(count, program, "--mpi", *steps, "--out", where, *arguments, options=options)
    assert code == 0, f"{name}: exit code {code}"
    return json.loads((where / "summary.json").read_text()), numbers(where / "adapters/adapter_model.safetensors")


def numbers(path):
    """All numbers of a file of adapters."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    assert all(it["dtype"] == "F32" for it in header.values())
    values = array("f")
    for key in sorted(header):
        begin, end = header[key]["data_offsets"]
        values.frombytes(data[8 + size + begin : 8 + size + end])
    return values


def norm(values):
    return sum(it * it for it in values) ** 0.5


def machines(directory):
    """Options of mpirun for four machines, whether there are any, and a function that takes them down."""
    names = [f"burn{number}" for number in range(4)]

    def remove():
        for name in names:
            run_quietly(f"ip netns delete {name}")
        run_quietly("ip link delete burnbridge")

    commands = ["ip link add burnbridge type bridge", "ip addr add 10.77.0.254/24 dev burnbridge"]
    commands += ["ip link set burnbridge up"]
    for number, name in enumerate(names):
        inside = f"ip netns exec {name}"
        commands += [
            f"ip netns add {name}",
            f"ip link add {name} type veth peer name inside netns {name}",
            f"ip link set {name} master burnbridge up",
            f"{inside} ip addr add 10.77.0.{number + 1}/24 dev inside",
            f"{inside} ip link set inside up",
            f"{inside} ip link set lo up",
        ]
    try:
        remove()
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        # Takes the place of ssh. Each machine has its own name, too.
        agent = directory / "agent"
        agent.write_text(
            '#!/bin/sh\nhost=$1; shift\nexec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"\n'
        )
        agent.chmod(0o755)
        hosts = directory / "hosts"
        hosts.write_text("".join(f"{name} slots=1\n" for name in names))
        subprocess.run([str(agent), names[0], "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no network namespaces ({error}); TCP on this machine takes their place")
        remove()
        return ["--mca", "btl", "tcp,self"], False, lambda: None
    network = [f"--mca {it}_tcp_if_include 10.77.0.0/24" for it in ("btl", "oob")]
    options = f"--mca plm_rsh_agent {agent} --hostfile {hosts} --mca btl tcp,self {' '.join(network)}"
    return options.split(), True, remove


def processes_named(word, arguments):
    """The numbers of the processes of a program that have all these arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if words[0].endswith(word) and all(it in words for it in arguments):
            found.append(int(entry.name))
    return sorted(found)


# One process, and the whole batch: that is what any number of replicas computes.
whole, expected = trained("one", 1)
results = {"threads": trained("threads", -2), "two": trained("two", 2), "again": trained("again", 2)}
results["four"] = trained("four", 4)
options, are_machines, remove = machines(out)
try:
    code, text = mpirun(4, "hostname", options=options)
    assert code == 0 and (are_machines == {f"burn{number}" for number in range(4)}.issubset(text.split()))
    results["machines"] = trained("machines", 4, options=options)
    # A machine that is lost ends the others. The file system is the same for all, and so are the processes' numbers.
    endless = [programs / "data_parallel", "--mpi", *steps[:1], "--steps", 1000000, "--out", out / "lost"]
    command = ["mpirun", *options, "-n", 4, *endless]
    with started(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        time.sleep(10)
        assert job.poll() is None, "the training must still run"
        lost = [int(it) for it in run_quietly("ip netns pids burn3").split()]
        lost = lost or processes_named("data_parallel", [str(out / "lost")])[-1:]
        start = time.monotonic()
        for process in lost:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It ended with one before.
        _, text = job.communicate(timeout=60)
    print(f"{text}\nThe job ended {time.monotonic() - start:.1f} s after {len(lost)} processes of a machine were killed.")
    assert job.returncode != 0 and time.monotonic() - start < 30
finally:
    remove()
for name, (summary, found) in results.items():
    error = norm([a - b for a, b in zip(found, expected)]) / norm(expected)
    print(f"{name}: {error:.1e} from one process")
    assert error < 1e-6, f"{name} trains to something else"
    for training, parameters in zip(summary["trainings"], (6, 6)):
        sent = 4 * (training["trainable"] + parameters + 1)
        assert training["step_bytes"] == sent, f"{training['step_bytes']} bytes, not {sent}"
prints = {name: summary["fingerprint"] for name, (summary, _) in results.items()}
assert prints["two"] == prints["again"] == prints["threads"], f"not the same bits: {prints}"
assert prints["four"] == prints["machines"], f"not the same bits: {prints}"

# What is no copy is refused, with the difference.
other = [programs / "data_parallel", "--mpi", *steps, "--out", out / "refused"]
code, text = mpirun(1, *other, ":", "-n", 1, *other, "--rank", 4)
assert code != 0 and "an adapter of rank 4" in text and "an adapter of rank 8" in text
code, text = mpirun(1, *other, ":", "-n", 1, *other, "--learning-rate", 0.002)
assert code != 0 and "has `learning_rate: 0.002,` where replica 0 has `learning_rate: 0.001,`" in text
assert not (out / "refused").exists()
# One that fails by itself ends the other, which waits for it.
code, text = mpirun(1, *other, ":", "-n", 1, *other[:2], "--data", out / "nowhere")
assert code != 0 and "error: replica 1: " in text and "nowhere" in text

# Without --mpi, each would train by itself, into the same files.
for program, arguments in [
    (programs / "data_parallel", [*steps, "--out", out / "refused"]),
    (programs.parent / "burn-lora", ["train", "--generated", "--out", out / "refused"]),
]:
    code, text = mpirun(2, program, *arguments)
    assert code != 0 and "OMPI_COMM_WORLD_SIZE=2" in text and "add `--mpi`" in text, text
    assert not (out / "refused").exists()

# Another base, in a language model that is made here.
model, model_out = programs.parent / "burn-lora", out / "small"
lm = [model, "train", "--mpi", "--mask-prompt", "--workers", 1]
small = [*lm, "--generated", "--iters", 60, "--eval-every", 20, "--batch", 8]
code, text = mpirun(2, *small, "--out", model_out)
assert code == 0 and "replicas                    2" in text
straight = numbers(model_out / "adapter/adapter_model.safetensors")
merged = out / "merged"
code, _ = run([model, "merge", "--model", model_out / "model", "--adapter", model_out / "adapter", "--out", merged])
assert code == 0
other = [*lm, "--iters", 2, "--out", out / "bases", "--data", model_out / "data", "--model"]
code, text = mpirun(1, *other, model_out / "model", ":", "-n", 1, *other, merged)
assert code != 0 and "replica 1 has `" in text and "is frozen" in text, "another base must be refused"

# One process with two workers is what two processes are, to the bit.
arguments = ["--model", model_out / "model", "--data", model_out / "data", "--iters", 20, "--batch", 8]
code, _ = run([*lm[:2], "--mask-prompt", "--workers", 2, *arguments, "--out", out / "workers"])
assert code == 0
code, _ = mpirun(2, *lm, *arguments, "--out", out / "processes")
assert code == 0
one, two = (out / it / "adapter/adapter_model.safetensors" for it in ("workers", "processes"))
assert one.read_bytes() == two.read_bytes(), "two processes and two workers have different bits"

# A replica that is killed ends all, and the last checkpoint resumes on another number of them.
killed = out / "killed"
long = [*lm, "--model", model_out / "model", "--data", model_out / "data", "--batch", 8, "--eval-every", 20]
long += ["--iters", 60, "--out", killed]
command = ["mpirun", "-n", 2, *long]
with started(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints/20").exists():
        assert job.poll() is None and time.monotonic() < deadline, "there is no checkpoint"
        time.sleep(0.05)
    victim = processes_named("burn-lora", [str(killed)])[-1]
    os.kill(victim, signal.SIGKILL)
    start = time.monotonic()
    text, _ = job.communicate(timeout=60)
seconds = time.monotonic() - start
print(f"{text}\nThe job ended {seconds:.1f} s after process {victim} was killed.")
assert job.returncode != 0 and seconds < 30
assert "rank 1" in text or "rank 0" in text, "the message must name the replica"
assert "signal 9" in text
code, text = mpirun(3, *long, "--resume")
assert code == 0 and "goes on after step" in text
resumed = numbers(killed / "adapter/adapter_model.safetensors")
error = norm([a - b for a, b in zip(resumed, straight)]) / norm(straight)
print(f"resumed on three processes: {error:.1e} from two that were not killed")
assert error < 1e-4
print("data-parallel training is right")
