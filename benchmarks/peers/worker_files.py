"""What a worker is told in its environment, and what it leaves in its folder. Loads no model library."""

CHECKPOINT_VARIABLE, FOLDER_VARIABLE = "PEER_CHECKPOINT", "PEER_FOLDER"
"""The environment is the one way into a worker that all contenders leave open."""

WORKER_FILE, STEPS_FILE = "worker.pid", "steps.log"
"""The process that holds the model (of the peers); a line `seed seconds` for each step of each clip, by
`time.monotonic`, whose clock all processes of a machine share."""
