"""What a process renews when its container was restored from a memory snapshot."""

import os
import random
from collections.abc import Mapping


def renew_process(environment: Mapping[str, str]) -> None:
    """Put these variables into the environment, and seed the random numbers anew: a restore has cloned their state.

    `secrets` and `uuid4` ask the kernel and need nothing. Clips don't either: each request has a seed of its own.
    """
    os.environ.update(environment)
    random.seed()
