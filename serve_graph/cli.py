"""The command line: `wan-serve`. Each command is a thin shell; errors are one line and an exit code.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from serve_graph.api_keys import InvalidApiKeys, Role, new_key
from serve_graph.settings import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Option("--config", "-c", help="A Ray Serve config file.")]


@app.callback()
def wan_serve() -> None:
    """Serve Wan 2.1: prompts in over HTTP, MP4 clips out behind URLs that expire."""


@app.command()
def serve(
    config: Config = Path("configs/local.yaml"),
    host: Annotated[str | None, typer.Option(help="Over the config file's.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Over the config file's.")] = None,
) -> None:
    """Run the service in the foreground until Ctrl-C or SIGTERM."""
    from serve_graph.server import StartFailed, load_config, serve_forever

    try:
        serve_forever(load_config(config, host, port))
    except ConfigError as error:
        _fail(str(error), 2)
    except StartFailed as error:
        _fail(str(error), 1)


@app.command()
def demo(
    config: Config = Path("configs/local.yaml"),
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle moving left",
    out: Annotated[Path, typer.Option(help="Folder for demo.mp4 and demo.png.")] = Path("out"),
) -> None:
    """Start the service, make one clip, save it with a contact sheet, stop the service."""
    from serve_graph.demo import DemoFailed, run_demo

    try:
        run_demo(config, prompt, out)
    except ConfigError as error:
        _fail(str(error), 2)
    except DemoFailed as error:
        _fail(str(error), 1)


key = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(key, name="key")


@key.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: a-z 0-9 . _ -")],
    role: Annotated[Role, typer.Option(help="`monitor` reads health, metrics and the models only.")] = Role.GENERATE,
    max_waiting_jobs: Annotated[int | None, typer.Option(min=1, help="Of this key; beyond it, 429.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of this key; beyond it, 429.")] = None,
) -> None:
    """Make an API key: prints the key, then its line for WAN_API_KEYS, which holds a hash only."""
    try:
        made, line = new_key(name, role, max_waiting_jobs, requests_per_minute)
    except InvalidApiKeys:
        _fail("a name is 1 to 64 of a-z 0-9 . _ - and not 'anonymous'", 2)
    print(made)
    print(line)
    print(
        "The first line is the key: hand it to its owner now, it is kept nowhere (Authorization: Bearer KEY).\n"
        "The second goes into the service's WAN_API_KEYS, beside those that are there.",
        file=sys.stderr,
    )


def main() -> None:
    """The entry point."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str, code: int) -> NoReturn:
    print(f"wan-serve: {message}", file=sys.stderr)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
