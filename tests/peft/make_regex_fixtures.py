"""Writes fixtures/expressions.json: whether names match expressions, by Python's `re`, as PEFT asks it.

Of each expression: the names that match as a whole, and those of which the end matches; null if Python refuses it.
"""

import json
import random
import re
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
random.seed(5)

NAMES = [
    "a", "aa", "ab", "b", "c", "z", "x.a", "x.aa", "x.y.a", "a]", "z]", "-]", "[:al]", "<a", "x.<a", "a1", "A", "B.a",
    "{start}a", "b{start}a", "a{start}a", "a{2", "a{}", "a{,}", "aaa", "aaaa", "a b", "a\n", "\n", "", "a.b", "a.\nb",
    "é", "²", "٣", "a\u0301", "Ωmega.a", "a-b", "a&b", "a|b", "a~", "a_b", "q_proj", "layers.0.q_proj",
    "model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.k_proj", "model.visual.layers.3.q_proj",
    "model.layers.3.mlp.gate_proj", "lm_head", "model.lm_head", "layers.10.mlp.up_proj", "ax", "a\\b", "a\x08", "aé",
]  # fmt: skip
EXPRESSIONS = [
    r"[[:alpha:]]", r"[a-z&&[a]]", r"[a-z--[a]]", r"[a-c~~b]", r"\<a", r"a\>", r"\b{start}a", r"a++a", r"a++b", r"a*+a",
    r"a?+a", r"a{1,2}+a", r"(?:aa)++a", r"\z", r"a\z", r"a\Z", r"\Aa", r"a$", r"^a$", r"a$\n", r"\ba", r"a\b", r"\Ba",
    r"(?x) a", r"(?i)A", r"a(?i)B", r"(?i:A)", r"(?i:A)b", r"(?-i:a)", r"(?s).", r".", r"(?s:.)", r"(?m)^a$", r"(?a)\w",
    r"(?u)\w", r"(?iu)a", r"(?i-s:a)", r"(?-:a)", r"(?)", r"\x61", r"\x{61}", r"\u0061", r"\u{61}", r"\U00000061", r"\h",
    r"\K", r"a\Kb", r"\R", r"\X", r"\p{L}", r"\pL", r"\PL", r"a{,2}", r"a{,}", r"a{}", r"a{2", r"a{2}", r"a{2,}", r"a{3,2}",
    r"a{2}{2}", r"a**", r"a*?", r"a+?", r"a??", r"a{1,2}?", r"(a*)*", r"(?:a*)+b", r"((a+)+)+", r"(a|b)*", r"(a|aa)a",
    r"^*", r"\b*", r"(?=a)*a", r"*a", r"a|*", r"|a", r"a|", r"()", r"(", r")", r"a)", r"(a", r"[", r"[]", r"[]a]", r"[^]]",
    r"[^a]", r"[a-]", r"[-a]", r"[\w-]", r"[\w-z]", r"[z-a]", r"[a\]]", r"[\b]", r"[\d]", r"[\D]", r"[\s\S]", r"[\q]",
    r"[\1]", r"[\141]", r"[\9]", r"\141", r"\0", r"\01", r"\8", r"(a)\1", r"(?P<n>a)(?P=n)", r"(?P<n>a)", r"(?<n>a)",
    r"(?P>n)", r"(?#x)a", r"a(?#x)*", r"(?#", r"(?>a+)a", r"(a)?(?(1)b|c)", r"(?!x)[ab]", r"(?!a).", r"(?=a)..", r"(?<=x\.)a",
    r".*(?<=x\.)a", r".*(?<!x\.)a", r"(?<=a|bb)a", r"(?<=a*)a", r"\d", r"\D", r"\s", r"\w", r"\W", r"\w+", r"[\w.]+", r"\.",
    r"\-", r"\_", r"\é", r"\ ", r"\q", r"\Q", r"\E", r"\G", r"\N{LATIN SMALL LETTER A}", r"\cA", r"\e", r"\t", r"\n",
    r"(?!.*visual).*(?:q|k)_proj", r".*\.layers\.\d+\.self_attn\.(q|k|v)_proj", r"(?:.*?(?:visual).*?(?:q_proj))",
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj|gate_proj)))", r"layers\.(?:[0-9]|10)\..*",
    r"^model\.layers\.0\.self_attn\.q_proj", r"q_proj", r"layers.0.q_proj", r".*lm_head", r"(?!lm_head).*", r"[^.]+_proj",
    r"model\.(?!layers\.11).*", r"(?i)(?s)A", r"(?i)(?:a|B)", r"[A-Z](?i:B)?", r"(?i)[^a]", r"a&&b", r"a||b", r"a\|b", r"é",
    r"[à-ÿ]", r"(?i)É", "a\nb", r"(?:a$|b)", r"(?:^a|b)c?", r"{", r"}", r"]", r"a{1,2}b?", r"(?:)", r"(?:){5}", r"(?:a?){3}",
    r"a{99999999999}",
    r"(?:(?!visual|vision_tower|multi_modal_projector|audio_tower|embed_tokens|merger).)*\.(?:q|k|gate)_proj",
    r"(?:.*?(?:language|layers).*?(?:self_attn|attn|mlp).*?(?:k_proj|q_proj|gate_proj).*?)|(?:\blm_head)",
    r"(?P<1>a)", r"(?P<>a)", r"((((((a))))))", "\\",
]  # fmt: skip
ATOMS = ["a", "b", ".", "\\.", "[ab]", "[^a]", "(a|b)", "(?:ab)", "(?!a)", "(?=b)", "^", "$", "\\b", "\\w", "\\d", "x", "(?<=a)"]


def drawn():
    text = ""
    for _ in range(random.randint(1, 6)):
        text += random.choice(ATOMS) + random.choice(["", "", "", "*", "+", "?", "{2}", "{,2}", "++", "*?", "|"])
    return text


def matches(match):
    found = []
    for index, name in enumerate(NAMES):
        if match(name):
            found.append(index)
    return found


def of(expression):
    try:
        whole = matches(lambda name: re.fullmatch(expression, name))
    except (re.error, OverflowError):
        whole = None
    try:
        end = matches(lambda name: re.match(rf"(.*\.)?({expression})$", name))
    except (re.error, OverflowError):
        end = None
    return {"expression": expression, "whole": whole, "end": end}


def main():
    drawn_ones = [drawn() for _ in range(400)]
    expressions = list(dict.fromkeys(EXPRESSIONS + drawn_ones))
    out = {"names": NAMES, "expressions": [of(it) for it in expressions]}
    text = json.dumps(out["names"]) + ',\n"expressions": [\n' + ",\n".join(json.dumps(it) for it in out["expressions"])
    path = Path(__file__).parent / "fixtures/expressions.json"
    path.write_text('{"names": ' + text + "\n]}\n")


main()
