"""How much faster a run is in several processes: graft.py, started by python and by torchrun.

Run: python benchmarks/processes.py   (on an idle machine with two cores: about ten minutes)
It times whole commands, with loading, evaluation and figures. Further flags are those of graft.py, which
else runs with its defaults. Result: benchmarks/results/processes.json.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run import RESULTS, ROOT
from utils.runs import write_json

WAYS = ((1, 1), (2, 1), (1, 2))  # (processes, threads of each)


def timed(processes: int, threads: int, flags: list[str], folder: Path) -> dict:
    """Seconds of one run, and what its processes used of the cores together."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, str(ROOT / "graft.py"), "--device", "cpu", "--output", str(folder), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"processes": processes, "threads": threads, "seconds": round(seconds, 1), "cpu": round(used, 1)}


def main():
    """Time the runs one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=1, help="of each way")
    options, flags = parser.parse_known_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS * options.repetitions:
            rows.append(timed(*way, flags, Path(folder) / f"run{len(rows)}"))
            print(rows[-1], flush=True)
    command = " ".join(["torchrun --nproc_per_node <processes> graft.py --device cpu", *flags])
    processor = f"{os.cpu_count()} cores of {platform.processor() or platform.machine()}"
    record = {"command": command, "seed": 0, "hardware": processor, "torch": torch.__version__}
    write_json(RESULTS / "processes.json", record | {"rows": rows})


if __name__ == "__main__":
    main()
