"""bench/gpu.py is for a GPU; here its dry run goes through every check."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_dry_run_on_a_cpu_prints_a_line_for_every_check_and_none_fails():
    """`stages` is left out: sft.py and dpo.py have their own tests."""
    script = ROOT / "bench" / "gpu.py"
    named = re.findall(r'(?m)^    "([a-z-]+)": [a-z_]+,$', script.read_text())
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
