#!/usr/bin/env python3
"""Stands in for a container engine where none is: `FAIRWAY_ENGINE`, with a folder by `STAND_IN`.

Notes each call and the settings that it came with in calls.jsonl, and answers what the folder's
answers.json has for the first pattern that the call matches. Fairway's own commands run here, and a
diff that is handed to a build is kept beside the calls.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

folder, words = Path(os.environ["STAND_IN"]), sys.argv[1:]
settings = {name: value for name, value in os.environ.items() if name.startswith("FAIRWAY_")}
with (folder / "calls.jsonl").open("a", encoding="utf-8") as file:
    file.write(json.dumps({"words": words, "settings": settings}) + "\n")
for word in words:
    if word.startswith("diff="):
        shutil.copy(Path(word.removeprefix("diff="), "git.diff"), folder)
if "fairway" in words:
    os.execvp("fairway", words[words.index("fairway") :])
for pattern, said in json.loads((folder / "answers.json").read_text(encoding="utf-8")).items():
    if re.search(pattern, " ".join(words)):
        print(said)
        break
