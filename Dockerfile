# The service's image, for `docker run` on one machine and for every node of a Ray cluster (configs/rayservice.yaml):
#   docker build -t wan-serve:0.1.0 .
FROM python:3.11-slim

# ffmpeg to look at clips, wget for KubeRay's probes, pgrep (procps) for its preStop hook.
RUN apt-get update \
  && apt-get install --yes --no-install-recommends ffmpeg procps wget \
  && rm -rf /var/lib/apt/lists/*

# As `make install` does it, without the tests' packages. PIP_ARGS: see the README's "A CPU-only torch".
ARG PIP_ARGS=""
COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY schemas /src/schemas
COPY storage /src/storage
COPY serve_graph /src/serve_graph
RUN pip install --no-cache-dir $PIP_ARGS -c /src/constraints.txt /src && rm -rf /src

# What `wan-serve serve` sets for itself and `ray start` has to find: serve_graph.server.RAY_ENVIRONMENT.
ENV RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_graph.proxy:proxy_middlewares \
    RAY_worker_niceness=0 \
    RAY_health_check_period_ms=1000 \
    RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S=1 \
    RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS=1 \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0 \
    RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0

RUN useradd --create-home --uid 1000 wan && install --directory --owner wan --mode 0700 /var/lib/wan-serve
USER wan
WORKDIR /home/wan
COPY configs configs

EXPOSE 8000
CMD ["wan-serve", "serve", "--config", "configs/local.yaml"]
