"""Asks llama.cpp itself (the wheel `xllamacpp`) to answer with files that burn-lora wrote.

usage: check_llamacpp.py PROMPT ANSWER MODEL.gguf [ADAPTER.gguf]
"""

import json
import sys
import urllib.request

import xllamacpp

prompt, expected, model, *adapters = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(it, 1.0) for it in adapters]
server = xllamacpp.Server(params)
body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 32}
request = urllib.request.Request(
    server.listening_address + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
)
answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
print(f"llama.cpp answers {answer!r}, and {expected!r} is expected")
sys.exit(answer.strip() != expected)
