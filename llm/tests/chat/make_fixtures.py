"""Writes what `transformers` makes of conversations with chat templates that do what those of known families do.

    python -m venv venv
    venv/bin/pip install transformers==5.24.0 jinja2==3.1.6
    venv/bin/python llm/tests/chat/make_fixtures.py
"""

import datetime
import json
from pathlib import Path

from transformers.utils import chat_template_utils


class Noon(datetime.datetime):
    """The clock of the tests."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, 7, 12, 5, 9, 42)


chat_template_utils.datetime = Noon

TEMPLATES = {
    # No role of a system: what it says is put before what the user says first.
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set before = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set before = "" -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("the roles must take turns") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (before if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("no such content") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
""",
    "gemma without a system": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' ~ message.role ~ '\n' ~ message.content | trim ~ '<end_of_turn>\n' }}"
    "{% endfor %}",
    "phi 3": "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\n' + "
    "message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\n' + message['content'] + '<|end|>\n'}}"
    "{% elif message['role'] == 'assistant' %}{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "phi 4 mini": "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "olmo 2": "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% endif %}{% if loop.last and add_generation_prompt %}"
    "{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
    "smollm 3": """{# what was not said #}
{%- if thinks is not defined -%}
{%- set thinks = true -%}
{%- endif -%}

{%- if thinks -%}
{%- set mode = "/think" -%}
{%- else -%}
{%- set mode = "/no_think" -%}
{%- endif -%}
{{- "<|im_start|>system\\n" -}}
{%- if messages[0].role == "system" -%}
{%- set told = messages[0].content -%}
{%- if "/no_think" in told -%}
{%- set mode = "/no_think" -%}
{%- elif "/think" in told -%}
{%- set mode = "/think" -%}
{%- endif -%}
{%- set custom = told.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}
{%- if "/override" in told -%}
{{- custom.replace("/override", "").rstrip() -}}
{{- "<|im_end|>\\n" -}}
{%- else -%}
{%- set today = strftime_now("%d %B %Y") -%}
{{- "Today: " ~ today ~ "\\n" -}}
{{- "Mode: " + mode + "\\n\\n" -}}
{%- if custom -%}
{{- custom + "\\n\\n" -}}
{%- elif mode == "/think" -%}
{{- "Think.\\n\\n" -}}
{%- endif -%}
{%- if xml_tools or python_tools -%}
{%- set ns = namespace(text="tools\\n") -%}
{%- for tool in xml_tools[:] -%}{%- set ns.text = ns.text ~ (tool | string) ~ "\\n" -%}{%- endfor -%}
{{- ns.text -}}
{%- endif -%}
{{- "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content if message.content is string else "" -%}
{%- if message.role == "user" -%}
    {{ "<|im_start|>" + message.role + "\\n"  + content + "<|im_end|>\\n" }}
{%- elif message.role == "assistant" -%}
    {% generation %}
    {%- if mode == "/think" -%}
        {{ "<|im_start|>assistant\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\\n" + "<think>\\n\\n</think>\\n" + content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- endif -%}
    {% endgeneration %}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" }}
{%- endif -%}
""",
    "granite 3": """{%- if tools and not offered -%}
    {%- set offered = tools -%}
{%- endif -%}
{%- if messages[0]['role'] == 'system' %}
     {%- set told = messages[0]['content'] %}
     {%- set rest = messages[1:] %}
 {%- else %}
     {%- set told = "Today: " + strftime_now('%B %d, %Y') + ".\\nYou help." %}
     {%- if offered and documents %}
         {%- set told = told + " With both." %}
     {%- elif documents %}
         {%- set told = told + " With documents." %}
     {%- endif %}
     {%- if 'citations' in controls and documents %}
         {%- set told = told + ' Cite.' %}
     {%- endif %}
     {%- set rest = messages %}
 {%- endif %}
 {{- '<|start_of_role|>system<|end_of_role|>' + told + '<|end_of_text|>\\n' }}
 {%- if offered %}
     {{- offered | tojson(indent=4) }}
 {%- endif %}
 {%- for message in rest %}
     {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}
     {%- if loop.last and add_generation_prompt %}
         {{- '<|start_of_role|>assistant' }}
             {%- if controls %}
                 {{- ' ' + controls | tojson()}}
             {%- endif %}
         {{- '<|end_of_role|>' }}
     {%- endif %}
 {%- endfor %}""",
    "mistral": "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if message == asked[-1] %}{% if tools %}{{ tools | string }}{% endif %}{{ '[LAST]' }}{% endif %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ '[SYSTEM]' + message['content'] }}{% endif %}{% endfor %}",
    # As Llama 3.2 and Qwen 3 do it.
    "dates and macros": """{{- bos_token }}
{%- if not day is defined %}
    {%- if strftime_now is defined %}
        {%- set day = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set day = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- macro turn(message, ending='\\n') %}
{{- '<|' ~ message.role ~ '|>' ~ message.content | trim ~ ending }}
{%- endmacro %}
{{- day }}
{%- if tools is not none %}{{- 'tools' }}{%- endif %}
{%- set ns = namespace(last=messages|length - 1, more=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.more and message.role == "user" and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.more = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- turn(message) }}
    {{- turn({'role': 'x', 'content': content}, ending='!') if loop.index0 > ns.last else '' }}
    {{- message | tojson }}
    {{- {'a': [1, 2.5, true, none, '<é&"\\n>'], 'b': {}, 'c': []} | tojson(indent=2) }}
    {{- [loop.index, loop.revindex, loop.length] | tojson }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
    {%- if thinks is defined and thinks is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}""",
}


def said(*contents, system=None):
    messages = [{"role": "system", "content": system}] if system is not None else []
    return messages + [{"role": ["user", "assistant"][index % 2], "content": content} for index, content in enumerate(contents)]


CONVERSATIONS = [
    said("Hi"),
    said("  Hi \n", "\n\nHello, <b>'you'</b> & \"me\" ", "Ça va? 😀", "</think>\n yes"),
    said("Hi", "<think>hm</think>\n\nHello", system="Be kind. "),
    said("Hi", system="Short. /no_think"),
    said("Hi", "No.", "Why?", system="Only this. /override"),
    said("Hi", system=""),
    [{"role": "assistant", "content": "I begin."}, {"role": "user", "content": "<r>Hi</r>"}],
]


def main():
    cases = []
    for name, template in TEMPLATES.items():
        for messages in CONVERSATIONS:
            for answer in [True, False] if messages is CONVERSATIONS[2] else [True]:
                case = {"name": name, "messages": messages, "answer": answer}
                try:
                    rendered, _ = chat_template_utils.render_jinja_template(
                        [messages], chat_template=template, add_generation_prompt=answer, bos_token="<s>", eos_token="</s>",
                    )
                    case["expected"] = rendered[0]
                except Exception as error:
                    case["error"] = str(error)
                cases.append(case)
    print(len(cases), "cases,", sum("error" in case for case in cases), "refused")
    print({(case["name"], case["error"]) for case in cases if "error" in case})
    path = Path(__file__).parent / "fixtures/templates.json"
    path.write_text(json.dumps({"templates": TEMPLATES, "cases": cases}, ensure_ascii=False, indent=0) + "\n")
    print(path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
