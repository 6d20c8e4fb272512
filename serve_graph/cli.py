"""The command line: `wan-serve`. Each command is a thin shell; errors are one line and an exit code.

Exit codes: 0 done, 1 the work failed, 2 wrong usage or configuration, 130 interrupted.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from serve_graph.api_keys import InvalidApiKeys, Role, new_key
from serve_graph.cli_batch import batch
from serve_graph.cli_client import FAILED, INTERRUPTED, WRONG_USAGE, AsJson, fail, print_json
from serve_graph.cli_eval import evaluate
from serve_graph.cli_generate import generate
from serve_graph.cli_jobs import cancel, health, jobs, models, status
from serve_graph.cli_plan import plan
from serve_graph.settings import ConfigError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Option("--config", "-c", help="A Ray Serve config file.")]
CONFIG = Path("configs/local.yaml")
Port = Annotated[int | None, typer.Option(min=1, max=65_535, help="Over the config file's.")]
Host = Annotated[str | None, typer.Option(help="Over the config file's.")]


@app.callback()
def wan_serve() -> None:
    """Serve Wan 2.1: prompts in over HTTP, MP4 clips out behind URLs that expire."""


@app.command()
def serve(config: Config = CONFIG, host: Host = None, port: Port = None, as_json: AsJson = False) -> None:
    """Run the service in the foreground until Ctrl-C or SIGTERM."""
    from serve_graph.server import StartFailed, load_config, serve_forever

    try:
        serve_forever(load_config(config, host, port), as_json=as_json)
    except ConfigError as error:
        fail(str(error), WRONG_USAGE, as_json)
    except StartFailed as error:
        fail(str(error), FAILED, as_json)


for command in (generate, batch, jobs, status, cancel, models, health, plan):
    app.command()(command)
app.command("eval")(evaluate)


@app.command()
def doctor(config: Config = CONFIG, host: Host = None, port: Port = None, as_json: AsJson = False) -> None:
    """Check what the service needs here, and say what to do; changes nothing. Exit code 1 when something is wrong."""
    from serve_graph.doctor import examine
    from serve_graph.findings import Mark

    checks = examine(config, host, port)
    failed = any(check.mark is Mark.FAIL for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": checks})
    else:
        for check in checks:
            print(
                f"{check.mark.value:<4}  {check.name:<13}  {check.found}{f' → {check.advice}' if check.advice else ''}"
            )
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def demo(
    config: Config = CONFIG,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to show; may be given several times.", show_default="eight held-out ones"),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo-1.mp4 and so on, and demo.png.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """Start the service, make clips, save them with a contact sheet, stop the service."""
    from serve_graph.demo import DemoFailed, run_demo

    try:
        report = run_demo(config, prompt or [], out)
    except ConfigError as error:
        fail(str(error), WRONG_USAGE, as_json)
    except DemoFailed as error:
        fail(str(error), FAILED, as_json)
    if as_json:
        print_json(report)
    else:
        report.show()


key = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(key, name="key")


@key.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is: a-z 0-9 . _ -")],
    role: Annotated[Role, typer.Option(help="`monitor` reads health, metrics and the models only.")] = Role.GENERATE,
    max_waiting_jobs: Annotated[int | None, typer.Option(min=1, help="Of this key; beyond it, 429.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Of this key; beyond it, 429.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make an API key: prints the key, then its line for WAN_API_KEYS, which holds a hash only."""
    try:
        made, line = new_key(name, role, max_waiting_jobs, requests_per_minute)
    except InvalidApiKeys:
        fail("a name is 1 to 64 of a-z 0-9 . _ - and not 'anonymous'", WRONG_USAGE, as_json)
    if as_json:
        print_json({"key": made, "line": line})
        return
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
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
