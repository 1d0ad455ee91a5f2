"""What a base is asked for its own texts is not what decoding is measured with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from dlm.bench.prompts import KINDS

SCRIPT = Path(__file__).parents[2] / "dev" / "prompts.py"
MEASURED = "lighthouse bottle fox crow train midnight sky weather climate refrigerator lovelace prime stack hints sql harbour alvarez"


def test_measured_prompts_are_not_learned() -> None:
    said = subprocess.run([sys.executable, SCRIPT, "3072"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == len(set(said)) == 3072
    assert not set(said) & {text for texts in KINDS.values() for text in texts}
    words = {word for line in said for word in re.findall(r"[\w']+", line.lower())}
    assert not words & set(MEASURED.split())
