"""How long from SIGTERM to a whole checkpoint, and to the end of all processes.

    python benchmarks/stop.py recipes/demo.yaml [--steps 3] [--setting value ...]

Starts ``tract-fast train`` on the recipe in a new folder, sends SIGTERM some steps later at a random moment, and
prints the times, the size of the checkpoint and how long training was held by one.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--steps", type=int, default=3)
    options, settings = parser.parse_known_args()
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, "-m", "tract_fast", "train", options.recipe, "--run.dir", str(folder / "run"), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    printed: list[str] = []
    threading.Thread(target=lambda: printed.extend(process.stdout), daemon=True).start()
    lines, latest = folder / "run" / "metrics.jsonl", folder / "run" / "checkpoints" / "latest"
    while not (lines.exists() and lines.read_text().count('"lr"') >= options.steps):
        if process.poll() is not None:
            raise SystemExit("".join(printed))
        time.sleep(0.02)
    time.sleep(random.random())
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    while not latest.exists():
        time.sleep(0.005)
    whole = time.perf_counter() - began
    code = process.wait()
    ended = time.perf_counter() - began
    time.sleep(0.2)  # for the last lines
    step = folder / "run" / "checkpoints" / latest.read_text().strip()
    size = sum(file.stat().st_size for file in step.iterdir())
    held = re.search(r"training held ([\d.]+) s, whole after ([\d.]+) s", "".join(printed))
    print(" ".join(command[1:]))
    print(f"checkpoint of {size / 1e6:.0f} MB: whole {whole:.2f} s after SIGTERM (rest of the step and its write)")
    print(f"its copy held training for {held[1]} s, its write ended after {held[2]} s")
    print(f"all processes ended {ended:.2f} s after SIGTERM, exit code {code}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
