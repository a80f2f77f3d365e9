"""Checks that the library's modules import one way: each only from those before it in the lists below.

So there is no circle. Tests in a file may import anything, and src/lib.rs does.
"""

import re
import sys
from pathlib import Path

src = Path(__file__).resolve().parent.parent / "src"
# The modules of a folder, the lowest first.
orders = {
    "src": """error pattern files table decomposition tensors burn_faults config precision quantized gguf_file ops products adapter layer
        decode adapters traverse model overlay formats train serve""",
    "src/ops": """pool backend operation autodiff rows simd patches quantized slices bf16 weight host times linear mixed conv columns channels
        gelu gated heads rotation normalize attention cross_entropy along dispatch testing""",
}
problems = []


def blanked(found):
    return re.sub(r"[^\n]", " ", found[0])


def code(text):
    """The text with blanks in the place of comments, strings and tests."""
    text = re.sub(r"'\\?.'", blanked, text)
    text = re.sub(r'//[^\n]*|r#".*?"#|"(?:\\.|[^"\\])*"', blanked, text, flags=re.S)
    return re.sub(r"^#\[cfg\(test\)\]\nmod \w+ \{.*?^\}", blanked, text, flags=re.S | re.M)


def paths(text, at, before=()):
    """The paths that begin here, as tuples of names with their place, and the place after them."""
    if text[at] != "{":
        name = re.compile(r"\w+|\*").match(text, at)
        path, more = (*before, name[0]), re.compile(r"::(?=[\w{*])").match(text, name.end())
        if more:
            return paths(text, more.end(), path)
        return [(path, at)], re.compile(r"(\s+as\s+\w+)?").match(text, name.end()).end()
    found, at = [], at + 1
    while text[at := re.compile(r"[\s,]*").match(text, at).end()] != "}":
        more, at = paths(text, at, before)
        found += more
    return found, at + 1


def check(place, folder, importer, imported):
    order = orders[folder].split()
    for name in {importer, imported} - set(order):
        problems.append(f"{place}: `{name}` is missing in the order of {folder}, in .ci/check_imports.py")
    if {importer, imported} <= set(order) and order.index(imported) > order.index(importer):
        problems.append(f"{place}: `{importer}` imports `{imported}`, which comes after it in {folder}")


for file in sorted(src.rglob("*.rs")):
    module = file.relative_to(src).with_suffix("").parts
    if module == ("lib",):
        continue
    name, text = file.relative_to(src.parent), code(file.read_text())
    check(name, "src", module[0], module[0])
    if module[0] == "ops" and len(module) > 1:
        check(name, "src/ops", module[1], module[1])
    for start in re.finditer(r"(?<!::)(?<!\w)(?:crate|super)::(?=[\w{*])", text):
        for path, at in paths(text, start.start())[0]:
            within = module if path[0] == "super" else ()
            while path and path[0] in ("crate", "super"):
                within, path = within[:-1], path[1:]
            path, place = (*within, *path), f"{name}:{text.count(chr(10), 0, at) + 1}"
            check(place, "src", module[0], path[0])
            if module[0] == path[0] == "ops" and len(module) > 1:
                check(place, "src/ops", module[1], path[1])

print(*dict.fromkeys(problems), sep="\n", end="\n" if problems else "")
sys.exit(bool(problems))
