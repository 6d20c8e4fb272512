"""Some hundred random requests, made from the OpenAPI document, to the running service.

The boundary values of each field are tried on the API alone: tests/unit/serve_graph/api/test_openapi_cases.py.
"""

from collections.abc import Callable
from pathlib import Path

from openapi_fuzz.run import fuzz

from tests.integration.service import RunningService

MAX_EXAMPLES = 15
MIN_CASES = 150


def test_every_answer_of_the_service_is_as_documented(
    service: RunningService, tmp_path: Path, tell: Callable[[str, str], None]
) -> None:
    outcome = fuzz(service.base, tmp_path, MAX_EXAMPLES, ("examples", "fuzzing"))
    tell("OpenAPI cases", f"the running service: {outcome.cases} in {outcome.seconds:.0f} s")
    assert outcome.passed, outcome.output
    assert outcome.cases >= MIN_CASES
