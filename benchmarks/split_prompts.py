"""Split a validation part (80 prompts) off the training prompts, the two wordings of a scene together; settings are chosen on it.

Run: python benchmarks/split_prompts.py
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from shapes.render import PROMPT_FILES, REVERSED, parse  # noqa: E402

groups = {}
for prompt in PROMPT_FILES["train"].read_text(encoding="utf-8").splitlines():
    first, relation, second = parse(prompt)
    groups.setdefault(min((first, relation, second), (second, REVERSED[relation], first)), []).append(prompt)
order = np.random.default_rng(1).permutation(len(groups))
scenes = list(groups.values())
for name, chosen in (("valid", order[:40]), ("tune", order[40:])):
    (HERE / f"prompts_{name}.txt").write_text("\n".join(p for i in chosen for p in scenes[i]) + "\n", encoding="utf-8")
