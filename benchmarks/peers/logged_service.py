"""`wan-serve serve` with the generator of `logged_generator`. Loads no Ray before its environment is set."""

import sys
from pathlib import Path

from serve_graph.server import load_config, serve_forever

if __name__ == "__main__":
    config = load_config(Path(sys.argv[1]))
    (application,) = config.serve["applications"]
    application["import_path"] = "benchmarks.peers.logged_generator:build_app"
    serve_forever(config)
