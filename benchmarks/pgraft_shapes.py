"""Every P-GRAFT row of the README: arms x seeds on the embedded model, each an ordinary command, two at a time.

Run: python benchmarks/pgraft_shapes.py            (everything that benchmarks/results/pgraft lacks, then the tables)
     python benchmarks/pgraft_shapes.py --tables   (only the tables, from the stored results)
     python benchmarks/pgraft_shapes.py --arms default_x0_0.4 --seeds 0 1 2
Three budgets: "default"; "small": 32 accepted pictures, 200 updates; "long": the same 32 pictures, 700 updates. The arms
"graft" are graft.py at that budget; its LoRA is evaluated also with the base model from a level on ("switched").
The levels 0.2, 0.4, 0.5, 0.7 are the states after 8, 6, 5, 3 of the 10 steps. The "valid" arms, by which the probe's limit was
chosen, and the "guidance3" arms hold out benchmarks/prompts_valid.txt, a part of the training prompts.
V(t) beside them: python pgraft.py --probe --probe_prompts 128 (probe.csv).
"""

from pathlib import Path

from graft_shapes import GUIDED, VALID, main

LEVELS = ["0.2", "0.4", "0.5", "0.7"]
ONE = ["--rounds", "1", "--prompts_per_round", "32"]
BUDGETS = {"default": ["--eval_every", "0"], "small": [*ONE, "--updates", "200"], "long": [*ONE, "--updates", "700"]}
ARMS, SWITCHES = {}, {}
for budget, arguments in BUDGETS.items():
    ARMS[f"{budget}_graft"] = ["graft.py", *arguments]
    SWITCHES[f"{budget}_graft"] = LEVELS
    for data, levels in {
        "default": {"x0": LEVELS, "xs": LEVELS},
        "small": {"x0": ["0.2", "0.4", "0.7"], "xs": ["0.2", "0.4", "0.7"]},
        "long": {"x0": ["0.4"], "xs": ["0.4"]},
    }[budget].items():
        for level in levels:
            ARMS[f"{budget}_{data}_{level}"] = ["pgraft.py", "--switch", level, "--data", data, *arguments]
ARMS["default_none_0.2"] = ["pgraft.py", "--switch", "0.2", "--rule", "none", *BUDGETS["default"]]
ARMS |= {f"valid_x0_{level}": ["pgraft.py", *VALID, "--switch", level, "--eval_every", "0"] for level in LEVELS[:3]}
ARMS["guidance3_graft"] = ["graft.py", *VALID, *GUIDED, "--no-guided_loss"]
SWITCHES["guidance3_graft"] = LEVELS
ARMS["guidance3_x0_0.4"] = ["pgraft.py", *VALID, *GUIDED, "--no-guided_loss", "--switch", "0.4"]

if __name__ == "__main__":
    main(__doc__, Path(__file__).resolve().parent / "results" / "pgraft", ARMS, SWITCHES)
