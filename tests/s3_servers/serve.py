"""`make serve-s3`: ministack on loopback and the service on it, in the foreground. For development only."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from s3_servers.ministack import BUCKETS, Ministack


def main() -> int:
    with Ministack(Path("data/ministack").absolute()) as server:
        environment = os.environ | {
            "WAN_STORAGE__S3__ENDPOINT": server.info.endpoint,
            "WAN_STORAGE__S3__BUCKET": f"{BUCKETS}clips",
            "WAN_S3_ACCESS_KEY": server.info.access_key,
            "WAN_S3_SECRET_KEY": server.info.secret_key,
        }
        command = [sys.executable, "-m", "serve_graph.cli", "serve", "--config", "configs/s3.yaml", *sys.argv[1:]]
        service = subprocess.Popen(command, env=environment)
        for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches the service itself, too
            signal.signal(number, lambda *_: service.send_signal(signal.SIGTERM))
        return service.wait()


if __name__ == "__main__":
    sys.exit(main())
