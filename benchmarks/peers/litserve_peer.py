"""LitServe with its batching: up to eight requests, gathered for 50 ms, go through `predict` together.

A batch is one call of the pipeline for each number of steps in it. `restart_workers` is on, so that a worker that died
is replaced. A request that doesn't stream goes on when its client has gone: LitServe doesn't look.
"""

import sys
from typing import Any

import litserve
from fastapi import Response

from benchmarks.peers.pipeline import Asked, Pipeline, taken

MAX_BATCH_SIZE, BATCH_TIMEOUT_S = 8, 0.05
"""As many slots as the service's engine has; the longest wait that its documentation's examples use is 0.05 to 0.1."""


class WanAPI(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.pipeline = Pipeline()

    def decode_request(self, request: dict[str, Any]) -> Asked:
        return Asked(request["prompt"], request["seed"], request["num_inference_steps"])

    def batch(self, inputs: list[Asked]) -> list[Asked]:
        return inputs

    def predict(self, batch: list[Asked]) -> list[bytes]:
        made: dict[Asked, bytes] = {}
        for steps in sorted({clip.num_inference_steps for clip in batch}):
            alike = [clip for clip in batch if clip.num_inference_steps == steps]
            made |= zip(alike, map(taken, self.pipeline.clips(alike)), strict=True)
        return [made[clip] for clip in batch]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="video/mp4")


if __name__ == "__main__":
    api = WanAPI(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
    server = litserve.LitServer(api, accelerator="cpu", timeout=False, restart_workers=True)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=1, generate_client_file=False)
