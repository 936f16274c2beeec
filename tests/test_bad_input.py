"""Bad input ends with exit code 2 and one line that names it and the fix, before the model loads, and leaves nothing on disk."""

import dataclasses
import json
import os
import resource
import shutil
import time
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, assert_one_line, run_inside, run_script

import common
import graft
import inverse_noise_correction
import noise_ppo
import pgraft
from common import LORA_FILE
from rewards import read_prompts

SD = '{"_class_name": "StableDiffusionPipeline"}'
EULER = '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
UNET = '{"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 1}'
FILES = {
    # prompts
    "train.txt": b"a red circle left of a blue square\na green square above a red circle\n",
    "held_out.txt": b"a blue circle above a green square\na red circle above a red square\n",
    "empty.txt": b"",
    "blank.txt": b"\n  \n\t\n",
    "one.txt": b"a red circle left of a blue square\n",
    "other.txt": b"a photo of a cat\na photo of a dog\n",
    "latin.txt": "a red circle\na caf\u00e9\n".encode("latin-1"),
    "utf16.txt": "a red circle\n".encode("utf-16"),
    "words.csv": b"id,words\n1,a red circle\n",
    "words.tsv": b"id\twords\n1\ta red circle\n",
    "header.csv": b"prompt\n",
    "long.csv": b'prompt\n"' + b"x" * 200_000 + b'"\n',  # more than the csv module takes
    "broken.jsonl": b'{"prompt": "a red circle"}\n\n{"prompt": \n',
    "list.jsonl": b"[1]\n",
    "number.jsonl": b'{"prompt": "a red circle"}\n{"prompt": 3}\n',
    "change.jsonl": b'{"text": "a red circle"}\n{"caption": "a red circle"}\n',
    "prompts.xlsx": b"a red circle\n",
    "folder.txt/something": b"",
    # rewards
    "raises.py": b"raise RuntimeError('two\\nlines')\n",
    "exits.py": b"import sys\nsys.exit(3)\n",
    "imports.py": b"import no_such_package\n",
    "syntax.py": b"def f(:\n",
    "good.py": b"number = 3\ndef f(images, prompts):\n    return [0.0] * len(images)\n",
    # models
    "model/model_index.json": SD.encode(),
    "no_pipeline/config.json": b"{}",
    "flux/model_index.json": b'{"_class_name": "FluxPipeline"}',
    "damaged/model_index.json": b"{",
    "list/model_index.json": b"[]",
    "unnamed/model_index.json": b"{}",
    "half/unet/config.json": b"{",
    "conditional/unet/config.json": b'{"_class_name": "UNet2DConditionModel"}',
    "ddpm/unet/config.json": UNET.encode(),
    "ddpm/scheduler/scheduler_config.json": b'{"_class_name": "DDPMScheduler"}',
    "alone/unet/config.json": UNET.encode(),
    "dynamic/unet/config.json": UNET.encode(),
    "dynamic/scheduler/scheduler_config.json": EULER.replace("}", ', "use_dynamic_shifting": true}').encode(),
    "classes/unet/config.json": UNET.replace("}", ', "num_class_embeds": 10}').encode(),
    "classes/scheduler/scheduler_config.json": EULER.encode(),
    "four/unet/config.json": UNET.replace("8", "4").encode(),
    "four/scheduler/scheduler_config.json": EULER.encode(),
    "large/unet/config.json": UNET.replace("8", "128").encode(),
    "large/scheduler/scheduler_config.json": EULER.encode(),
    "few/picture.png": b"",
    # runs
    "full/something.txt": b"",
    "a_run/args.json": b"{}",
    "run_damaged/args.json": b'{"seed": 3',
    "run_list/args.json": b"[]",
    "run_bytes/args.json": b"\xff\xfe\x00",
    "run_other/args.json": b'{"no_such_setting": 3}',
    "run_type/args.json": b'{"seed": "many"}',
    "run_folder/args.json/something": b"",
    "run_model/args.json": b'{"model": "no/such/folder"}',
    # results of P-GRAFT, with a LoRA that is never looked into
    "no_lora/pgraft.json": b'{"switch_timestep": 499, "sigma": 0.5}',
    **{f"{name}/{LORA_FILE}": b"" for name in ("no_json", "not_json", "number", "no_level", "text", "infinite")},
    "not_json/pgraft.json": b"{",
    "number/pgraft.json": b"[499, 0.5]",
    "no_level/pgraft.json": b'{"sigma": 0.5}',
    "text/pgraft.json": b'{"switch_timestep": "high", "sigma": 0.5}',
    "infinite/pgraft.json": b'{"switch_timestep": Infinity, "sigma": 0.5}',
}
SCRIPTS = {"graft": graft, "pgraft": pgraft, "noise_ppo": noise_ppo, "inverse_noise_correction": inverse_noise_correction}
ALL = " ".join(SCRIPTS)
TEXT = "graft pgraft noise_ppo"  # they take prompts and a reward
TUNE = "graft pgraft"  # they tune a LoRA
GOOD = {
    script: "--prompts @/train.txt --eval_prompts @/held_out.txt --model @/model --reward jpeg_compressibility"
    for script in SCRIPTS
}
GOOD["inverse_noise_correction"] = "--pictures 20 --eval_pictures 20 --no-longer"

# scripts -> {arguments, added to the GOOD ones: what the line must contain, parts separated by |}; @ is the folder of FILES
EARLY = [  # found before anything is loaded
    (
        ALL,
        {
            "--seedz 3": "--seedz | perhaps you meant --seed; see --help",
            "hello": "hello | see --help",
            "--seed": "'--seed' | see --help",
            "--seed three": "--seed | 'three' | see --help",
            "--seed 1.5": "--seed | '1.5' | see --help",
            "--seed=": "--seed | see --help",
            "--seed -1": "--seed -1: must be between 0 and",
            "--seed 99999999999999999999": "--seed 99999999999999999999: must be between 0 and",
            "--lr 0": "--lr 0.0: must be between 1e-12 and 1",
            "--lr -0.1": "--lr -0.1: must be between",
            "--lr nan": "--lr nan: must be between",
            "--lr inf": "--lr inf: must be between",
            "--lr much": "--lr | 'much' | see --help",
            "--steps 0": "--steps 0: must be between",
            "--steps -4": "--steps -4: must be between",
            "--steps 1000000000000": "--steps 1000000000000: must be between",
            "--sample_batch 0": "--sample_batch 0: must be between 1 and",
            "--sample_batch -8": "--sample_batch -8: must be between 1 and",
            "--device tpu": "--device tpu: must be auto, cpu or cuda",
            "--device cuda": "--device cuda: no CUDA device found; use --device cpu",
            "--output @/full": "--output | full: exists and is not a run; give a new folder",
            "--output @/empty.txt": "--output | empty.txt | give a new folder",
            "--output @/empty.txt/run": "--output | empty.txt | give a new folder",
            "--output @/a_run": "--output | a_run: holds a run already; continue it with --resume",
            "--model @/missing": "--model | missing: no such folder",
            "--model=": "--model | folder",
            "--model @/one.txt": "--model | one.txt | folder",
        },
    ),
    (
        TEXT,
        {
            "--prompts @/missing.txt": "--prompts | missing.txt: no such file; give",
            "--prompts @/folder.txt": "--prompts | folder.txt: no such file; give",
            "--prompts @/folder": "--prompts | folder: give a .txt file",
            "--prompts=": "--prompts | give a .txt file",
            "--prompts a.red.circle": "--prompts a.red.circle: give a .txt file",
            "--prompts @/prompts.xlsx": "--prompts | prompts.xlsx: give a .txt file",
            "--prompts @/empty.txt": "--prompts | empty.txt: holds no prompt; write",
            "--prompts @/blank.txt": "--prompts | blank.txt: holds no prompt; write",
            "--prompts @/latin.txt": "--prompts | latin.txt: line 2 is not UTF-8; save the file as UTF-8",
            "--prompts @/utf16.txt": "--prompts | utf16.txt: line 1 is not UTF-8; save the file as UTF-8",
            "--prompts @/words.csv": "words.csv: no column 'prompt' in the first line, which has id, words; choose one as words.csv:column",
            "--prompts @/words.tsv": "words.tsv: no column 'prompt' in the first line, which has id, words; choose one as words.tsv:column",
            "--prompts @/words.csv:Words": "words.csv:Words: no column 'Words' | choose one as words.csv:column",
            "--prompts @/missing.csv:words": "missing.csv:words: no such file; give",
            "--prompts @/one.txt:words": "one.txt:words: give a .txt file",
            "--prompts @/header.csv": "--prompts | header.csv: holds no prompt; write",
            "--prompts @/long.csv": "--prompts | long.csv: is no proper .csv file",
            "--prompts @/broken.jsonl": '--prompts | broken.jsonl: line 3 is not {"prompt": "..."}',
            "--prompts @/list.jsonl": '--prompts | list.jsonl: line 1 is not {"prompt": "..."}',
            "--prompts @/number.jsonl": '--prompts | number.jsonl: line 2 is not {"prompt": "..."}',
            "--prompts @/change.jsonl": '--prompts | change.jsonl: line 2 is not {"text": "..."}',
            "--prompts @/change.jsonl:prompt": '--prompts | change.jsonl:prompt: line 1 is not {"prompt": "..."}',
            "--prompts @/one.txt --eval_prompts=": "--prompts | one.txt: too few to hold out two for evaluation; add more or give --eval_prompts",
            "--eval_prompts @/one.txt": "--eval_prompts | one.txt: too few to hold out two for evaluation; add more",
            "--eval_prompts @/missing.txt": "--eval_prompts | missing.txt: no such file; give",
            "--eval_prompts @/empty.txt": "--eval_prompts | empty.txt: holds no prompt; write",
            "--prompts @/other.txt --reward shapes_strict": "--prompts | choose another --reward and --eval_rewards",
            "--eval_prompts @/other.txt --eval_rewards shapes_fit": "--eval_prompts | choose another --reward and --eval_rewards",
            "--eval_samples 0": "--eval_samples 0: must be between 2 and",
            "--eval_samples 1": "--eval_samples 1: must be between 2 and",
            "--eval_samples 1000000000": "--eval_samples 1000000000: must be between 2 and 10000",
            "--eval_every -1": "--eval_every -1: must be between 0 and",
            "--guidance 0.5": "--guidance 0.5: must be between 1 and",
            "--guidance inf": "--guidance inf: must be between 1 and",
            "--samples 0": "--samples 0: must be between",
            "--samples 1000000000000000": "--samples 1000000000000000: must be between | and 10000",
            "--dtype int8": "--dtype int8: must be one of float32, float16, bfloat16",
            "--dtype float16 --device cpu": "--dtype float16 needs a CUDA device; on the CPU use --dtype float32 or bfloat16",
            "--reward beauty": "--reward beauty: no reward 'beauty'; take shapes_strict",
            "--reward=": "--reward | no reward ''; take shapes_strict",
            "--reward shapes_fit+": "--reward shapes_fit+: no reward ''; take shapes_strict",
            "--reward x*shapes_graded": "--reward x*shapes_graded: the weight in 'x*shapes_graded' is no number",
            "--reward nan*shapes_graded": "--reward | the weight in 'nan*shapes_graded' is no number",
            "--reward @/missing.py:f": "--reward | missing.py; give path/to/file.py:function",
            "--reward @/folder.py:f": "--reward | folder.py; give path/to/file.py:function",
            "--reward @/good.py": "--reward | good.py'; take | path/to/file.py:function",
            "--reward @/good.py:g": "--reward | good.py has no function 'g'",
            "--reward @/good.py:number": "--reward | good.py has no function 'number'",
            "--reward @/raises.py:f": "--reward | raises.py does not load (RuntimeError: two lines)",
            "--reward @/exits.py:f": "--reward | exits.py does not load (SystemExit: 3)",
            "--reward @/imports.py:f": "--reward | imports.py does not load (ModuleNotFoundError: No module named 'no_such_package')",
            "--reward @/syntax.py:f": "--reward | syntax.py does not load (SyntaxError",
            "--eval_rewards beauty": "--eval_rewards beauty: no reward 'beauty'; take shapes_strict",
            "--eval_rewards jpeg_incompressibility,beauty": "--eval_rewards beauty: no reward 'beauty'; take",
            "--eval_rewards @/raises.py:f": "--eval_rewards | raises.py does not load",
            "--reward clip(@/missing)": "--reward clip( | missing' is no folder, and no hub id of the form owner/name",
            "--reward clip(@/full) --eval_rewards beauty": "--eval_rewards beauty: no reward 'beauty'",  # names before models
            "--reward clip(@/full)": "--reward clip( | full cannot be loaded | another checkpoint is given as 'clip(folder or hub id)'",
            "--eval_rewards jpeg_compressibility,0.5*vqa(@/full)": "--eval_rewards 0.5*vqa( | another checkpoint is given as 'vqa(folder",
            "--reward_device tpu": "--reward_device tpu: must be auto, cpu or cuda",
            "--reward_device cuda": "--reward_device cuda: no CUDA device found; use --reward_device cpu",
            "--reward_dtype int8": "--reward_dtype int8: must be one of float32",
            "--reward_device cpu --reward_dtype float16": "--reward_dtype float16 needs a CUDA device; on the CPU use",
            "--reward_batch 0": "--reward_batch 0: must be between 1 and 1000000",
            "--model @/no_pipeline": "--model | no_pipeline: cannot be loaded | No such file | model_index.json | give the folder or hub id of a pipeline",
            "--model @/flux": "--model | flux: is a FluxPipeline; supported: StableDiffusionPipeline, StableDiffusionXLPipeline",
            "--model @/unnamed": "--model | unnamed: is a None; supported: StableDiffusionPipeline",
            "--model @/damaged": "--model | damaged: cannot be loaded (Expecting property name | give the folder or hub id of a pipeline",
            "--model @/list": "--model | list: cannot be loaded | give the folder or hub id of a pipeline",
            f"--model {ROOT / 'shapes' / 'flow'}": "--model | flow: cannot be loaded | No such file | model_index.json",
            "--model nobody/nothing": "--model nobody/nothing: cannot be loaded",  # offline
        },
    ),
    (
        TUNE,
        {
            "--rounds 0": "--rounds 0: must be between 1 and",
            "--rounds -1": "--rounds -1: must be between 1 and",
            "--rounds 1000000000": "--rounds 1000000000: must be between 1 and 10000",
            "--rounds True": "--rounds | 'True' | see --help",
            "--accumulate no": "no | see --help",
            "--prompts_per_round 0": "--prompts_per_round 0: must be between 1 and",
            "--top_k 9": "--top_k 9: must be between 1 and 8",
            "--top_k 0": "--top_k 0: must be between 1 and 8",
            "--rule best": "--rule best: must be one of topk, preference",
            "--rule none --top_k 2": "--top_k 2: is of --rule topk, not none",
            "--threshold 0.5": "--threshold 0.5: is of --rule threshold, not topk; leave out one of the two",
            "--rule threshold --threshold 1 --beta 0.1": "--beta 0.1: is of --rule exponential, not threshold",
            "--rule preference --reward_max 1": "--reward_max 1.0: is of --rule exponential, not preference",
            "--rule threshold": "--rule threshold needs --threshold, the least reward",
            "--rule threshold --threshold nan": "--threshold nan: must be a finite number",
            "--rule exponential": "--rule exponential needs --beta above 0",
            "--rule exponential --beta -1": "--rule exponential needs --beta above 0",
            "--rule exponential --beta nan": "--rule exponential needs --beta above 0",
            "--rule exponential --beta inf": "--beta inf: must be a finite number",
            "--rule exponential --beta 1 --reward_max nan": "--reward_max nan: must be a finite number",
            "--rule preference --samples 3": "--samples 3: must be even for --rule preference",
            "--reference oldest": "--reference oldest: must be one of newest, base",
            "--updates 0": "--updates 0: must be between 1 and",
            "--batch 0": "--batch 0: must be between 1 and",
            "--batch 1000000000000": "--batch 1000000000000: must be between 1 and",
            "--micro_batch 0": "--micro_batch 0: must be between 1 and",
            "--micro_batch 3": "--micro_batch 3: must divide --batch 64",
            "--lora_rank 0": "--lora_rank 0: must be between 1 and 1024",
            "--lora_rank 1000000": "--lora_rank 1000000: must be between 1 and 1024",
            "--lora_alpha 0": "--lora_alpha 0.0: must be between",
            "--lora_alpha nan": "--lora_alpha nan: must be between",
            "--eta 2": "--eta 2.0: must be between 0 and 1",
            "--eta -0.5": "--eta -0.5: must be between 0 and 1",
            "--prompt_dropout 1": "--prompt_dropout 1.0: must be between 0 and 0.99",
        },
    ),
    (
        "graft",
        {
            "--shard 1/2": "--shard 1/2: give --sample_only and i/n with i from 1 to n",
            "--sample_only --shard 3/2": "--shard 3/2: give --sample_only and i/n with i from 1 to n",
            "--sample_only --shard 0/2": "--shard 0/2: give --sample_only and i/n with i from 1 to n",
            "--sample_only --shard one": "--shard one: give --sample_only and i/n with i from 1 to n",
            "--sample_only --shard 1000/1000": "--shard 1000/1000: a round has only 2 prompts; take fewer shards",
        },
    ),
    (
        "pgraft",
        {
            **{
                f"--switch {s}": f"--switch {s}: must be auto or a level t / T"
                for s in ("0", "1", "1.5", "nan", "inf", "noisy")
            },
            "--switch=-0.2": "--switch -0.2: must be auto or a level t / T",
            "--switch=": "--switch : must be auto or a level t / T",
            "--eta 0": "--eta 0: a deterministic sampler has nothing to probe; give --eta above 0, or --switch",
            "--eta 0 --probe": "--eta 0: | give --eta above 0",
            "--eta 0 --probe --switch 0.5": "--eta 0: | give --eta above 0",
            "--probe --steps 1": "--steps 1: no level lies between noise and picture; give at least 2",
            "--probe --evaluate @/no_json": "--probe --evaluate: | give one of the two",
            "--data x1": "--data x1: must be one of x0, xs",
            "--probe_restarts 1": "--probe_restarts 1: must be between 2 and",
            "--probe_prompts 1": "--probe_prompts 1: must be between 2 and",
            "--probe_limit 2": "--probe_limit 2.0: must be between 0 and 1",
            "--probe_limit -0.1": "--probe_limit -0.1: must be between 0 and 1",
            "--evaluate @/missing": f"--evaluate @/missing: has no {LORA_FILE}; give the folder of a finished graft.py or pgraft.py run",
            "--evaluate @/no_lora": f"--evaluate @/no_lora: has no {LORA_FILE}; give the folder of a finished graft.py or pgraft.py run",
            "--evaluate @/no_json": "no_json/pgraft.json: does not exist; give the folder of a finished pgraft.py run, or the level with --switch",
            **{
                f"--evaluate @/{name}": f"{name}/pgraft.json: is damaged; give the level with --switch"
                for name in ("not_json", "number", "no_level", "text", "infinite")
            },
        },
    ),
    (
        "noise_ppo",
        {
            "--lora @/full": "--lora",
            "--switch_timestep 200": "--switch_timestep 200: is of a LoRA; give --lora",
            "--iterations 0": "--iterations 0: must be between 1 and",
            "--iterations 1000000000": "--iterations 1000000000: must be between 1 and 100000",
            "--iterations many": "--iterations | 'many' | see --help",
            "--prompts_per_iteration 0": "--prompts_per_iteration 0: must be between 1 and",
            "--samples 1": "--samples 1: must be between 2 and",
            "--policy random": "--policy random: must be one of conditional, unconditional",
            "--normalise max": "--normalise max: must be one of batch, prompt, none",
            "--reduction median": "--reduction median: must be one of mean, sum",
            "--mean_only --std_only": "--mean_only --std_only: nothing is left to learn; give --no-mean_only",
            "--clip 0": "--clip 0.0: must be between",
            "--clip -0.1": "--clip -0.1: must be between",
            "--clip nan": "--clip nan: must be between",
            "--kl_weight -1": "--kl_weight -1.0: must be between 0 and",
            "--kl_weight nan": "--kl_weight nan: must be between 0 and",
            "--epochs 0": "--epochs 0: must be between 1 and",
            "--minibatch 0": "--minibatch 0: must be between 1 and",
            "--hidden 0": "--hidden 0: must be between 1 and",
            "--hidden 1000000000": "--hidden 1000000000: must be between 1 and 10000",
            "--grid 0": "--grid 0: must be between 1 and",
            "--eval_steps 4,x": "--eval_steps 4,x: give whole numbers from 1 to 999, separated by commas",
            "--eval_steps 0": "--eval_steps 0: give whole numbers from 1 to 999",
            "--eval_steps 4,1000": "--eval_steps 4,1000: give whole numbers from 1 to 999",
            "--eval_steps 4;5": "--eval_steps 4;5: give whole numbers from 1 to 999, separated by commas",
        },
    ),
    (
        "inverse_noise_correction",
        {
            "--model @/full": "--model | full: no such folder, or neither unet/ nor transformer/ in it",
            "--model @/model": "--model | model: no such folder, or neither unet/ nor transformer/ in it",
            "--model @/half": "--model | half: unet/config.json is missing or damaged",
            "--model @/alone": "--model | alone: scheduler/scheduler_config.json is missing or damaged",
            "--model @/conditional": "--model | is a UNet2DConditionModel; supported: UNet2DModel",
            "--model @/ddpm": "--model | is a DDPMScheduler; supported: FlowMatchEulerDiscreteScheduler",
            "--model @/dynamic": "--model | a scheduler with use_dynamic_shifting is not supported",
            "--model @/classes": "--model | only unconditional models are supported",
            "--model @/four": "--data: the embedded pictures are (1, 8, 8), the model's (1, 4, 4); give a folder of pictures",
            "--data @/missing": "--data | missing: no such folder",
            "--data @/one.txt": "--data | one.txt: no such folder",
            "--data @/few": "--data | few: 1 pictures are too few, 20 to invert and 20 as reference are needed",
            "--features beauty": "--features beauty: must be one of shapes, pixels, inception",
            "--model @/four --data @/few --features shapes": "--features shapes: judges pictures of shape (1, 8, 8) only | use pixels",
            "--features inception": "--features inception: needs the package torch-fidelity (pip install torch-fidelity), or use pixels",
            "--model @/large --corrector_network unet:4 --normalise gaussian": "--normalise gaussian: 16384 numbers | take scale",
            "--normalise no": "--normalise no: must be one of | scale, gaussian",
            "--steps 1": "--steps 1: must be between 2 and 1000",
            "--grid_power 0": "--grid_power 0.0: must be between 0.1 and 10",
            "--grid_power nan": "--grid_power nan: must be between 0.1 and 10",
            "--pictures 5": "--pictures 5: must be between 20 and",
            "--pictures 1000000000": "--pictures 1000000000: must be between 20 and",
            "--memory -1": "--memory -1: must be between 0 and 20",
            "--tolerance 0": "--tolerance 0.0: must be between",
            "--tolerance nan": "--tolerance nan: must be between",
            "--max_iterations 0": "--max_iterations 0: must be between 1 and",
            "--max_failed 1.5": "--max_failed 1.5: must be between 0 and 1",
            "--data_noise -1": "--data_noise -1.0: must be between 0 and 10",
            "--reference_share 1": "--reference_share 1.0: must be between 0.05 and 0.95",
            "--held_out 0": "--held_out 0.0: must be between 0.01 and 0.9",
            "--longer_lr nan": "--longer_lr nan: must be between",
            "--batch 0": "--batch 0: must be between 1 and",
            "--updates 0": "--updates 0: must be between 1 and",
            "--checkpoint_every 0": "--checkpoint_every 0: must be between 1 and",
            "--eval_pictures 3": "--eval_pictures 3: must be between 20 and",
            "--eval_steps 3,x": "--eval_steps 3,x: give whole numbers from 1 to 10000, separated by commas",
            "--eval_steps 1.5": "--eval_steps 1.5: give whole numbers from 1 to 10000",
            "--eval_powers 0": "--eval_powers 0: give numbers from 0.1 to",
            "--eval_corrector_steps 0": "--eval_corrector_steps 0: give whole numbers from 1 to",
            "--corrector_steps 0": "--corrector_steps 0: must be between 1 and",
            "--corrector_network 8,8": "--corrector_network 8,8: give unet: or token: and numbers",
            "--corrector_network unet:5": "--corrector_network unet:5: give unet: or token: and numbers",
            "--corrector_network unet:": "--corrector_network unet:: give unet: or token: and numbers",
            "--corrector_network token:99999999": "--corrector_network token:99999999: give unet: or token: and numbers from 4 to 4096",
            "--corrector_network unet:4,4,4,4,4": "--corrector_network | 5 levels need a size that 16 divides",
            "--corrector_network token:8,4": "--corrector_network token:8,4: the layers of a token network have one width, as in",
            "--train_base --base_network unet:3": "--base_network unet:3: give unet: or token: and numbers",
            "--train_base --channels 2": "--channels 2: must be 1 (grey) or 3 (RGB)",
            "--train_base --size 0": "--size 0: must be between 1 and",
            "--train_base --size 1000000": "--size 1000000: must be between 1 and 1024",
        },
    ),
]
RESUMED = {  # in place of the GOOD arguments
    "--resume @/missing": "--resume | missing: no run there (no args.json); give the folder that the run printed",
    "--resume @/full": "--resume | full: no run there (no args.json); give the folder that the run printed",
    "--resume @/one.txt": "--resume | one.txt: no run there",
    "--resume @/run_folder": "--resume | run_folder: no run there",
    "--resume @/run_damaged": "--resume | run_damaged: args.json is damaged or of another script | start a new run",
    "--resume @/run_list": "--resume | run_list: args.json is damaged or of another script | start a new run",
    "--resume @/run_bytes": "--resume | run_bytes: args.json is damaged or of another script | start a new run",
    "--resume @/run_other": "--resume | run_other: args.json is damaged or of another script | start a new run",
    "--resume @/run_type": "--resume | run_type: args.json is damaged or of another script | start a new run",
    "--resume @/run_model": "--model no/such/folder: no such folder",
    "--resume @/a_run --seed 7": "--seed 7 differs from the run in | a_run (0): leave it out, or start a new run",
    "--resume @/a_run --lr 0.5": "--lr 0.5 differs from the run in | a_run | leave it out, or start a new run",
    "--resume @/a_run --output elsewhere": "--output elsewhere differs from the run in | leave it out, or start a new run",
    **{
        f"--resume @/run_of_{script}": "--resume | args.json is damaged or of another script | start a new run"
        for script in SCRIPTS
    },
}
EARLY.append((ALL, RESUMED))
EARLY_ROWS = [(script, given, words) for scripts, rows in EARLY for given, words in rows.items() for script in scripts.split()]
EARLY_ROWS = [row for row in EARLY_ROWS if not row[1].endswith(f"run_of_{row[0]}")]

LATE = [  # found when the model has been loaded; % is the folder of late_files, $ the script
    (
        ALL,
        {
            "--output /proc/run": "--output /proc/run: cannot be written | give another folder",
            **{
                f"--resume %/{damage}_$": "--resume | checkpoint.pt is damaged | start a new run"
                for damage in ("cut", "text", "no_bytes")
            },
        },
    ),
    (
        TEXT,
        {
            "--model %/cut_unet": "--model | cut_unet: cannot be loaded",
            "--model %/cut_vae": "--model | cut_vae: cannot be loaded",
            "--model %/no_text_encoder": "--model | no_text_encoder: cannot be loaded",
        },
    ),
    (
        TUNE,
        {
            "--lora_targets to_z": "--lora_targets to_z: the model has no linear or convolution layer 'to_z'",
            "--lora_targets=": "--lora_targets | the model has no linear or convolution layer ''",
            "--steps 999": "--steps 999: must be below the model's 1000 training steps | with 'trailing' spacing, divide them",
        },
    ),
    (
        "pgraft",
        {
            "--switch 0.01 --steps 10": "--switch 0.01: with --steps 10 it must be at least 0.099 and below 0.999",
            "--switch 0.0989 --steps 10": "--switch 0.0989: with --steps 10 it must be at least 0.099",
            "--switch 0.9999 --steps 10": "--switch 0.9999: with --steps 10 it must be | below 0.999",
            "--switch 0.999 --steps 10": "--switch 0.999: with --steps 10 it must be | below 0.999",
            "--switch 0.5 --steps 1": "--switch 0.5: with --steps 1 it must be",
            "--evaluate %/too_large": "too_large/pgraft.json does not fit the model: | give --model other/model",
            "--evaluate %/negative": "negative/pgraft.json does not fit the model: | give --model other/model",
            "--evaluate %/other_level": "other_level/pgraft.json does not fit the model: | give --model other/model",
            "--evaluate %/cut_lora --switch 0.5": f"cut_lora/{LORA_FILE}: cannot be loaded",
        },
    ),
    (
        "noise_ppo",
        {
            "--steps 3": "--steps 3: must divide the model's 1000 training steps",
            "--eval_steps 4,30": "--eval_steps 30: must divide the model's 1000 training steps",
        },
    ),
    ("inverse_noise_correction", {"--model %/cut_flow": "--model | cut_flow: cannot be loaded"}),
]
LATE_ROWS = [(script, given, words) for scripts, rows in LATE for given, words in rows.items() for script in scripts.split()]

IN_A_PROCESS = [
    row
    for row in EARLY_ROWS + LATE_ROWS
    if row[:2]
    in {
        ("graft", "--seedz 3"),
        ("pgraft", "--prompts @/missing.txt"),
        ("noise_ppo", "--steps 3"),
        ("inverse_noise_correction", "--resume %/cut_$"),
    }
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for name, script in SCRIPTS.items():
        (folder / f"run_of_{name}").mkdir()
        (folder / f"run_of_{name}" / "args.json").write_text(json.dumps(dataclasses.asdict(script.Args())))
    return folder


@pytest.fixture(scope="module")
def late_files(files, tiny_v, tmp_path_factory):
    folder = tmp_path_factory.mktemp("late_files")
    shutil.copytree(tiny_v, folder / "cut_unet")
    shutil.copytree(tiny_v, folder / "cut_vae")
    shutil.copytree(tiny_v, folder / "no_text_encoder", ignore=shutil.ignore_patterns("text_encoder"))
    shutil.copytree(ROOT / "shapes" / "flow", folder / "cut_flow")
    weights = "diffusion_pytorch_model.safetensors"
    for name in (f"cut_unet/unet/{weights}", "cut_vae/vae/config.json", f"cut_flow/transformer/{weights}"):
        os.truncate(folder / name, 500)
    for name, level in {"too_large": 1000, "negative": -1, "other_level": 499, "cut_lora": 499}.items():
        (folder / name).mkdir()
        stored = {"switch_timestep": level, "sigma": 0.5, "model": "other/model"}
        (folder / name / "pgraft.json").write_text(json.dumps(stored))
        (folder / name / LORA_FILE).write_bytes(safetensors.torch.save({"unet.lora": torch.zeros(100)})[:-10])
    torch.save({"round": 1, "rows": [{"loss": 1.0}] * 100}, folder / "checkpoint.pt")
    whole = (folder / "checkpoint.pt").read_bytes()
    for script in SCRIPTS:
        stored = {"pictures": 20, "eval_pictures": 20, "longer": False}
        if script in TEXT.split():
            stored = {"prompts": str(files / "train.txt"), "eval_prompts": str(files / "held_out.txt"), "model": tiny_v}
            stored |= {"reward": "jpeg_compressibility"}
        for damage, content in {"cut": whole[: len(whole) // 2], "text": b"hello", "no_bytes": b""}.items():
            run = folder / f"{damage}_{script}"
            run.mkdir()
            (run / "args.json").write_text(json.dumps(stored | {"device": "cpu"}))
            (run / "checkpoint.pt").write_bytes(content)
    return folder


def arguments_of(script, given, files, late_files="", model=""):
    """The script's good arguments and the bad ones."""
    good = "" if given.startswith("--resume") else GOOD[script]
    good += f" --model {model}" if model and script in TEXT.split() and good else ""
    return f"{good} {given}".replace("@", str(files)).replace("%", str(late_files)).replace("$", script).split()


def refused(code, error, words, seconds, files):
    """Exit code 2 and one line that holds the words, in less than ten seconds of the processor; nothing new in the folder."""
    parts = [part.strip() for part in words.replace("@", str(files)).split("|")]
    assert_one_line(code, error, parts[0])
    assert all(part in error for part in parts), error
    assert seconds < 10 and not list(Path.cwd().iterdir())


def names(*folders):
    return [
        sorted(p for p in Path(folder).rglob("*") if "__pycache__" not in p.parts and p.name != ".lock")
        for folder in folders
        if folder
    ]


def instead_of_loading(monkeypatch, action):
    for kind in (diffusers.DiffusionPipeline, diffusers.ModelMixin, diffusers.SchedulerMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(kind, "from_pretrained", action)


@pytest.mark.parametrize("script, given, words", EARLY_ROWS)
def test_found_before_the_model_loads(script, given, words, files, tmp_path, monkeypatch):
    if "device cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    instead_of_loading(monkeypatch, lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    before, begun = names(files), time.process_time()
    code, _, error = run_inside(arguments_of(script, given, files), f"{script}.py")
    refused(code, error, words, time.process_time() - begun, files)
    assert names(files) == before


@pytest.mark.parametrize("script, given, words", LATE_ROWS)
def test_found_when_the_model_is_loaded(script, given, words, files, late_files, tiny_v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, begun = names(files, late_files), time.process_time()
    code, _, error = run_inside(arguments_of(script, given, files, late_files, tiny_v), f"{script}.py")
    refused(code, error, words, time.process_time() - begun, files)
    assert names(files, late_files) == before


@pytest.mark.parametrize("script, given, words", IN_A_PROCESS)
def test_in_a_process_of_its_own(script, given, words, files, late_files, tiny_v, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script(arguments_of(script, given, files, late_files, tiny_v), tmp_path, f"{script}.py")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    refused(done.returncode, done.stderr, words, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, files)
    assert not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_rows_are_bad_for_their_own_reason(script, files, tmp_path, monkeypatch):
    """The arguments to which they are added are good."""

    class Reached(BaseException):
        pass

    def loading(*_, **__):
        raise Reached

    instead_of_loading(monkeypatch, loading)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Reached):
        run_inside(arguments_of(script, "", files), f"{script}.py")


def test_out_of_memory_is_one_line(files, tiny_v, tmp_path, monkeypatch):
    """torch's own error on the CPU, MemoryError, and no other RuntimeError."""
    monkeypatch.chdir(tmp_path)

    def run(action):
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", action)
        small = f"--model {tiny_v} --steps 2 --rounds 1 --samples 2 --rule none --eval_samples 2 --output {len(list(Path.cwd().iterdir()))}"
        return run_inside(arguments_of("graft", small, files), "graft.py")

    for action in (lambda *_: torch.empty(2**60), lambda *_: bytearray(2**62)):
        code, _, error = run(action)
        assert_one_line(code, error.split("\r")[-1].lstrip(), "out of memory (")
        assert "lower the batch sizes" in error
    with pytest.raises(RuntimeError, match="size of tensor"):
        run(lambda *_: torch.zeros(2) + torch.zeros(3))


def test_a_folder_that_must_not_be_written(files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root, who may run the tests, is refused nothing
    monkeypatch.chdir(tmp_path)
    for given in ("--output new/run", ""):
        code, _, error = run_inside(arguments_of("graft", given, files), "graft.py")
        assert_one_line(code, error, f"{tmp_path} is no folder that can be written to; give a new folder")


@pytest.mark.parametrize("body", ["[0.0]", "[float('nan')] * len(images)"])
def test_reward_that_returns_nonsense(body, tiny_arguments, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(f"def score(images, prompts):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    code, _, error = run_inside([*tiny_arguments, "--reward", "mine.py:score"])
    assert_one_line(code, error.split("\r")[-1], "mine.py:score")  # what stands after the progress bar


# ---------------------------------------------------------------- good files


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_read_prompts(tmp_path, mark):
    expected = ["a red, round circle", "a caf\u00e9 \u2028 below"]
    texts = {
        "good.txt": "a red, round circle  \r\n\r\na caf\u00e9 \u2028 below",
        "good.csv": 'id,prompt\n1,"a red, round circle"\n2,\n3,a caf\u00e9 \u2028 below\n4\n',
        "good.jsonl": "\n".join(json.dumps({"id": 1, "prompt": p}, ensure_ascii=False) for p in expected) + "\n\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(mark + text.encode())
        assert read_prompts(str(tmp_path / name), "--prompts") == expected, name


GENEVAL = """{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}
"""
PARTI = """Prompt\tCategory\tChallenge\tNote
bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings
"G I G G L E" painted in thick colorful lettering as graffiti.\tIllustrations\tWriting & Symbols\t
"so it begins\tIllustrations\tWriting & Symbols\tLongest word: "a lung disease"
42\tAbstract\tBasic\tSimple numbers
"""
DRAWBENCH = """Prompts,Category
A red colored car.,Colors
"One cat and two dogs, sitting on the grass.",Counting
"A sign that says ""Deep
Learning"".",Text
"""
PUBLISHED = {
    "evaluation_metadata.jsonl": (GENEVAL, ["a photo of a bench", "a photo of a red car"]),
    "PartiPrompts.tsv": (
        PARTI,
        ["bond", '"G I G G L E" painted in thick colorful lettering as graffiti.', '"so it begins', "42"],
    ),
    "drawbench.csv": (
        DRAWBENCH,
        ["A red colored car.", "One cat and two dogs, sitting on the grass.", 'A sign that says "Deep Learning".'],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_published_prompt_files(tmp_path, name, ends):
    """Files in the layout of GenEval, PartiPrompts and DrawBench."""
    text, expected = PUBLISHED[name]
    (tmp_path / name).write_bytes(text.replace("\n", ends).encode())
    assert read_prompts(str(tmp_path / name), "--prompts") == expected


def test_column_of_prompts(tmp_path):
    for kind, between in ((".csv", ","), (".tsv", "\t")):
        for columns, chosen in (
            ("Text,caption,id", "caption"),
            ("id,TEXT", "TEXT"),
            ("caption,Prompts, Prompt ", " Prompt "),
            ("prompt,Prompt", "prompt"),
        ):
            file, names = tmp_path / f"file{kind}", columns.split(",")
            rows = [between.join(names), between.join(f"in {name}" for name in names)]
            file.write_text("\n".join(rows) + "\n")
            assert read_prompts(str(file), "--prompts") == [f"in {chosen}".strip()]
            for name in names:  # chosen by its exact name
                assert read_prompts(f"{file}:{name}", "--prompts") == [f"in {name}".strip()]
    line = json.dumps({"file_name": "a.png", "text": "in text", "Other": "in Other"})
    (tmp_path / "metadata.jsonl").write_text(line + "\n")  # as --save_accepted writes it
    assert read_prompts(str(tmp_path / "metadata.jsonl"), "--prompts") == ["in text"]
    assert read_prompts(f"{tmp_path / 'metadata.jsonl'}:Other", "--prompts") == ["in Other"]
    (tmp_path / "a:b.csv").write_text("prompt\nin a:b\n")
    assert read_prompts(str(tmp_path / "a:b.csv"), "--prompts") == ["in a:b"]


@pytest.mark.parametrize("script", ["graft.py", "pgraft.py", "noise_ppo.py"])
def test_overlap_of_prompts(script, tiny_arguments, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def model(*_):
        raise Reached

    monkeypatch.setattr(common, "Model", model)
    (tmp_path / "train.txt").write_text("a red circle left of a blue square\nA blue square below a RED square\n")
    argv, printed = [*tiny_arguments[: tiny_arguments.index("--rounds")], "--prompts", str(tmp_path / "train.txt")], []
    monkeypatch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
    for held_out, warned in (
        (["a red circle left of a green square", "a red square above a red circle"], None),
        (["a red square above a red circle", "a blue square BELOW a red square"], "1 of the 2"),
    ):
        (tmp_path / "held_out.txt").write_text("\n".join(held_out))
        with pytest.raises(Reached):
            run_inside([*argv, "--eval_prompts", str(tmp_path / "held_out.txt")], script)
        assert len(printed) == bool(warned)
    assert printed[0].startswith("warning: 1 of the 2 held-out prompts") and held_out[1] in printed[0]
