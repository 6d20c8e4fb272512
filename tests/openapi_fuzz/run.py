"""Runs schemathesis: its examples, its boundary values and its random cases."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openapi_fuzz.hooks import BASE_URL

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 3_600
PHASES = ("examples", "coverage", "fuzzing")
"""All but its chains of requests, which end in an error of its own where none can go on."""
REPLACED = "not_a_server_error"  # by `fails_only_as_documented`
NOT_MEANT = "positive_data_acceptance"  # the document says what a request is; the profile, which values it takes


@dataclass(frozen=True)
class Outcome:
    """What schemathesis found. accepted: how many cases were answered with success, by operation."""

    cases: int
    seconds: float
    operations: int
    passed: bool
    output: str
    accepted: dict[str, int]


def fuzz(base_url: str, folder: Path, max_examples: int, phases: Sequence[str] = PHASES) -> Outcome:
    """Send cases, at most `max_examples` random ones for each operation, to the service at `base_url`."""
    report = folder / "report.json"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{base_url}/openapi.json"),
        *("--phases", ",".join(phases), "--request-timeout", "60"),
        *("--max-examples", str(max_examples), "--continue-on-failure", "--no-color"),
        *("--exclude-checks", f"{REPLACED},{NOT_MEANT}", "--generation-database", "none"),
        *("--report", "json", "--report-json-path", str(report)),
    ]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "SCHEMATHESIS_HOOKS": "openapi_fuzz.hooks",
        "NO_PROXY": "127.0.0.1",
        BASE_URL: base_url,
    }
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    output = ran.stdout + ran.stderr
    assert report.exists(), output
    found = json.loads(report.read_text())
    return Outcome(
        cases=found["test_cases"]["generated"],
        seconds=found["running_time"],
        operations=found["operations"]["tested"],
        passed=ran.returncode == 0,
        output=output,
        accepted={name: sum(p["accepted"] for p in phases.values()) for name, phases in found["valid_rates"].items()},
    )
