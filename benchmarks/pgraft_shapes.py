"""Every P-GRAFT row of the README: arms x seeds on the embedded model, each an ordinary command, two at a time.

Run: python benchmarks/pgraft_shapes.py            (everything that benchmarks/results/pgraft lacks, then the tables)
     python benchmarks/pgraft_shapes.py --tables   (only the tables, from the stored results)
     python benchmarks/pgraft_shapes.py --arms default_x0_0.4 --seeds 0 1 2
Three budgets: "default"; "small": 32 accepted pictures, 200 updates; "long": the same 32 pictures, 700 updates. The arms
"graft" are graft.py at that budget; its LoRA is evaluated also with the base model from a level on.
The levels 0.2, 0.4, 0.5, 0.7 are the states after 8, 6, 5, 3 of the 10 steps.
"""

from pathlib import Path

from graft_shapes import main

LEVELS = ["0.2", "0.4", "0.5", "0.7"]
ONE = ["--rounds", "1", "--prompts_per_round", "32"]
BUDGETS = {"default": ["--eval_every", "0"], "small": [*ONE, "--updates", "200"], "long": [*ONE, "--updates", "700"]}
ARMS, SWITCHES = {}, {}
for budget, arguments in BUDGETS.items():
    ARMS[f"{budget}_graft"] = ["graft.py", *arguments]
    SWITCHES[f"{budget}_graft"] = LEVELS
    for level in LEVELS:
        for data in ("x0", "xs"):
            ARMS[f"{budget}_{data}_{level}"] = ["pgraft.py", "--switch", level, "--data", data, *arguments]
    ARMS[f"{budget}_none_0.2"] = ["pgraft.py", "--switch", "0.2", "--rule", "none", *arguments]

if __name__ == "__main__":
    main(__doc__, Path(__file__).resolve().parent / "results" / "pgraft", ARMS, SWITCHES)
