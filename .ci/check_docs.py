"""Checks the pages in Markdown: links lead somewhere, figures have descriptions, and pieces of an example are its own.

Programs in them are compiled and run as documentation tests, which src/lib.rs includes.
"""

import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
pages = [root / "README.md", root / "CONTRIBUTING.md", root / "llm/README.md", *root.glob("docs/**/*.md"), *root.glob("benches/*.md")]
examples = {path.stem for path in root.glob("examples/*.rs")}
examples |= {path.parent.name for path in root.glob("examples/*/main.rs")}
library = (root / "src/lib.rs").read_text()
problems = []


def without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


def anchors(text):
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", it.lower()) for it in headings)
    return {it.strip().replace(" ", "-") for it in plain}


for page in pages:
    text, name = page.read_text(), page.relative_to(root)
    for program in re.findall(r"```rust.*?\n(.*?)```", text, flags=re.S):
        # rustdoc hides them, but who reads the page elsewhere copies them.
        if re.search(r"^ *# ", program, flags=re.M):
            problems.append(f"{name}: a program has hidden lines")
    for image, description, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", without_code(text)):
        if image and len(description) < 20:
            problems.append(f"{name}: the figure {target} needs a description")
        if target.startswith(("http://", "https://")):
            continue
        target, _, anchor = target.partition("#")
        file = page.parent / target if target else page
        if not file.exists():
            problems.append(f"{name}: there is no {target}")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file.read_text()):
            problems.append(f"{name}: {target} has no section {anchor}")
    for example in re.findall(r"--example (\w+)", text):
        if example not in examples:
            problems.append(f"{name}: there is no example {example}")
    if "docs/guide" in str(name):
        if "```rust\n" in text and f'include_str!("../{name}")' not in library:
            problems.append(f"{name}: its programs are not tested in src/lib.rs")
        source = (root / "examples/quickstart.rs").read_text()
        for piece in re.findall(r"```rust,ignore\n(.*?)```", text, flags=re.S):
            if piece not in source:
                problems.append(f"{name}: not a piece of examples/quickstart.rs:\n{piece}")

print(*problems, sep="\n", end="\n" if problems else "")
print(f"{len(pages)} pages")
sys.exit(bool(problems))
