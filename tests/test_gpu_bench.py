"""bench/gpu.py is for a GPU; here its dry run goes through every check."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_dry_run_on_a_cpu_prints_a_line_for_every_check_and_none_fails():
    """`stages` is left out: sft.py and dpo.py have their own tests."""
    script = ROOT / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("bench_gpu", script)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    named = list(bench.CHECKS)
    wanted = [name for name in named if name != "stages"]
    done = subprocess.run(
        [sys.executable, str(script), "--cpu", "--only", *wanted],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    told = re.findall(r"(?m)^(PASS|FAIL|info) (\S+) ", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for _, name in told] == wanted and len(named) == 19
    assert "FAIL" not in done.stdout
