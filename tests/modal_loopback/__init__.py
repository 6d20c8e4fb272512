"""A Modal on loopback, for tests: the real client, CLI and container entry point run against it, with no account.

- `loopback`: `Loopback`, what a test uses: the CLI, the records, containers, waiting.
- `records`, `limits`: what was deployed, as tests assert on it; what the real server refuses.
- `control_plane`, `storage`: the RPCs that define apps; images, mounts, Secrets, Volumes and blobs.
- `calls`, `web`: inputs and outputs of functions; HTTP to web functions.
- `container`, `worker`: one container as a process, with its snapshot life cycle; how many of them run.
- `clock`, `clock.c`: a wall clock that a test moves, for all processes of one container.
- `rpc`: RPCs from methods of their names.
- `sample_app`: an app for the loopback's own tests.

Beyond it: mounted paths (a container sees its files below the folder it starts in, and its Volumes and image not at
all), GPUs and their part of a snapshot, `min_containers` and an autoscaler with a clock, input and startup timeouts,
Sandboxes, Queues, Dicts, `with_options` and parametrised classes.
"""

from modal_loopback.container import Container
from modal_loopback.loopback import Finished, Loopback

__all__ = ["Container", "Finished", "Loopback"]
