"""Prints paragraphs of this repository's pages as texts to evaluate a model on, a line of JSON each: paragraphs.py COUNT"""

import json
import re
import sys
from pathlib import Path

pages = sorted((Path(__file__).resolve().parent.parent / "docs").glob("**/*.md"))
paragraphs = (" ".join(it.split()) for page in pages for it in re.split(r"\n\s*\n", page.read_text()))
texts = [it for it in paragraphs if len(it) > 150 and it[0] not in "|`#<-"]
for text in texts[: int(sys.argv[1])]:
    print(json.dumps({"text": text}))
