"""Checks a server that runs: check_server.py URL ROOT PID SECONDS

ROOT is its directory of adapters with the sets `polite` and `plain`, whose answers differ. The client is
OpenAI's own, `pip install openai`. For SECONDS, 64 clients stream answers, and every tenth hangs up.
"""

import http.client
import json
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import openai

url, root, pid, seconds = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
client = openai.OpenAI(base_url=url, api_key="none needed", max_retries=0, timeout=120)
question = [{"role": "user", "content": "Where does the dog live?"}]


def ask(model, **more):
    return client.chat.completions.create(
        **{"model": model, "messages": question, "temperature": 0, "max_tokens": 40, **more})


def stream(model, stop_after=None):
    pieces, fingerprints, reason = [], set(), None
    with ask(model, stream=True) as parts:
        for part in parts:
            fingerprints.add(part.system_fingerprint)
            pieces.append(part.choices[0].delta.content or "")
            reason = part.choices[0].finish_reason or reason
            if stop_after and len(pieces) >= stop_after:
                begun = "".join(pieces)
                assert begun and expected[model][0].startswith(begun), (model, begun)
                return None
    assert reason == "stop", reason
    assert len(fingerprints) == 1, fingerprints
    return "".join(pieces), fingerprints.pop()


def metrics():
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return {name: float(value) for name, value in (it.split() for it in lines if it[0] != "#")}


def resident():
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


# The models, alone and at the same time.
assert [model.id for model in client.models.list()] == ["base", "plain", "polite"]
assert client.models.retrieve("polite").id == "polite"
expected = {}
for model in ["base", "plain", "polite"]:
    answer = ask(model)
    expected[model] = (answer.choices[0].message.content, answer.system_fingerprint)
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    print(model, expected[model])
assert expected["polite"][0] == expected["base"][0].replace(".", ", my friend."), expected
assert expected["plain"][0] == expected["base"][0]
assert len({fingerprint for _, fingerprint in expected.values()}) == 3
cut = ask("base", max_tokens=2)
assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)
stopped = ask("base", stop=[" lives"])
assert stopped.choices[0].message.content == "The dog", stopped
usage = [part for part in ask("base", stream=True, stream_options={"include_usage": True})][-1].usage
assert usage.completion_tokens > 0
text = client.completions.create(model="polite", prompt="The dog", temperature=0, max_tokens=3)
assert text.object == "text_completion" and text.usage.completion_tokens <= 3
# It goes on with the text, space included.
assert text.choices[0].text.startswith(" "), text
drawn = [ask("base", temperature=1.5, seed=seed).choices[0].message.content for seed in [1, 1]]
assert drawn[0] == drawn[1], drawn

# What is wrong is told.
for error, more in [
    (openai.NotFoundError, {"model": "nobody"}),
    (openai.NotFoundError, {"model": "../polite"}),
    (openai.BadRequestError, {"logprobs": True}),
    (openai.BadRequestError, {"max_tokens": -1}),
    (openai.BadRequestError, {"temperature": "hot"}),
    (openai.BadRequestError, {"messages": []}),
    (openai.BadRequestError, {"n": 3}),
    (openai.BadRequestError, {"messages": [{"role": "user", "content": "dog " * 100_000}]}),
]:
    try:
        ask(more.pop("model", "base"), **more)
    except error as refused:
        assert refused.body["message"], refused
    else:
        raise AssertionError(f"{more} was answered")
for body, status in [(b"{", 400), (b"", 400), (b"[1]", 400), (b"x" * 10_000_000, 413), (b"\xff\xfe", 400)]:
    connection = http.client.HTTPConnection(url.split("/")[2])
    try:
        connection.request("POST", "/v1/chat/completions", body)
    except BrokenPipeError:
        pass  # It did not read on.
    answer = connection.getresponse()
    assert answer.status == status, (body[:10], answer.status)
    assert json.loads(answer.read())["error"]["message"]

# A set that breaks is told, and one that never was whole.
def problems():
    listed = {model.id: model.model_extra.get("problem") for model in client.models.list()}
    told = {name: problem for name, problem in listed.items() if problem}
    assert metrics()["burn_lora_adapter_problems"] == len(told), (metrics(), told)
    return told


assert problems() == {}
broken = root / "broken"
broken.mkdir()
for name in ["adapter_config.json", "adapter_model.safetensors"]:
    (broken / name).write_bytes((root / "plain" / name).read_bytes()[:100])
try:
    ask("broken")
except openai.UnprocessableEntityError as refused:
    assert problems() == {"broken": refused.body["message"]}, problems()
else:
    raise AssertionError("a broken set answered")
for name in ["adapter_config.json", "adapter_model.safetensors"]:
    (broken / name).write_bytes((root / "plain" / name).read_bytes())
assert problems() == {}
assert ask("broken").choices[0].message.content == expected["plain"][0]
(broken / "adapter_model.safetensors").write_bytes(b"nothing")
assert ask("broken").choices[0].message.content == expected["plain"][0], "the set that was there before answers"
assert list(problems()) == ["broken"], problems()
for name in ["adapter_config.json", "adapter_model.safetensors"]:
    (broken / name).unlink()
broken.rmdir()
assert problems() == {}

# A body that never comes is waited for while the others are answered, and then refused.
never = http.client.HTTPConnection(url.split("/")[2], timeout=60)
never.putrequest("POST", "/v1/chat/completions")
never.putheader("Content-Length", "10")
never.endheaders(b"{")

# Many clients at once, of whom every tenth hangs up.
counts, failures = Counter(), []
end = time.time() + seconds


def keep_asking(index):
    turn = index
    while time.time() < end and not failures:
        turn += 1
        model = ["base", "plain", "polite"][turn % 3]
        try:
            answer = stream(model, stop_after=3 if turn % 10 == 0 else None)
            if answer is None:
                counts["hung up"] += 1
            else:
                assert answer == expected[model], (model, answer, expected[model])
                counts[model] += 1
        except Exception as error:
            failures.append(error)


def all_ask():
    threads = [threading.Thread(target=keep_asking, args=(index,)) for index in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


end = time.time() + min(seconds / 4, 5)
all_ask()
before, counts = resident(), Counter()
end = time.time() + seconds
all_ask()
print(f"64 clients, {seconds:.0f} s: {dict(counts)}; {before:.0f} MiB before, {resident():.0f} after")
assert min(counts.values()) > 0 and len(counts) == 4, counts
assert resident() < before + 40, "memory grows"
time.sleep(1)
numbers = metrics()
assert numbers["burn_lora_batch_size"] == numbers["burn_lora_queue"] == 0, numbers
assert numbers["burn_lora_abandoned_total"] > 0, numbers

# A set that is replaced while it answers: 1,000 answers, 100 replacements.
link, spare = root / "current", root / ".current"
link.symlink_to("plain")
answers, done = Counter(), threading.Event()


def ask_current():
    while not failures and not done.is_set():
        try:
            answer = ask("current")
            answers[answer.choices[0].message.content, answer.system_fingerprint] += 1
        except Exception as error:
            failures.append(error)


threads = [threading.Thread(target=ask_current) for _ in range(16)]
for thread in threads:
    thread.start()
replaced = 0
while not failures and (replaced < 100 or sum(answers.values()) < 1000):
    time.sleep(0.04)
    spare.symlink_to(["polite", "plain"][replaced % 2])
    os.replace(spare, link)
    replaced += 1
done.set()
for thread in threads:
    thread.join()
link.unlink()
if failures:
    raise failures[0]
print(f"{sum(answers.values())} answers while a set was replaced {replaced} times: {dict(answers)}")
assert set(answers) == {expected["plain"], expected["polite"]}, answers

answer = never.getresponse()
assert answer.status == 408, answer.status
assert json.loads(answer.read())["error"]["message"]
