"""The command line. Errors go to standard error, one line each, and say what to do; exit code 1, or 2 for wrong usage."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from l4mesh import __version__
from l4mesh.errors import CommandError, ConfigError

DEFAULT_CONFIG = Path("/etc/l4mesh")
DEFAULT_ADMIN = "127.0.0.1:15000"
PAGE = 1000

config_option = click.option(
    "-c", "--config", "paths", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
    help=f"A configuration file, or a folder of them; may be repeated. Default: {DEFAULT_CONFIG}.",
)  # fmt: skip
admin_option = click.option(
    "--admin", default=DEFAULT_ADMIN, show_default=True, metavar="ADDRESS", help="host:port or unix:path of the admin server."
)
netns_option = click.option("--netns", metavar="NAME", help="Work in this network namespace (a name of `ip netns`, or a path).")


def main() -> None:
    """Entry point. Turns the errors that an operator can do something about into one line each."""
    try:
        cli(standalone_mode=True)
    except ConfigError as error:
        for problem in error.problems:
            click.echo(f"l4mesh: {problem}", err=True)
        sys.exit(1)
    except CommandError as error:
        fail(str(error))
    except BrokenPipeError:
        sys.exit(1)


def fail(message: str) -> NoReturn:
    click.echo(f"l4mesh: {message}", err=True)
    sys.exit(1)


def _paths(paths: tuple[Path, ...]) -> list[Path]:
    return list(paths) or [DEFAULT_CONFIG]


class Examples(click.Command):
    """A command whose epilog is printed as it stands."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write(f"\nExample:\n  {self.epilog}\n")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """A service-mesh data plane for TCP: captures, balances, forwards and accounts for connections."""


@cli.command(cls=Examples, epilog="l4mesh run -c /etc/l4mesh")
@config_option
def run(paths: tuple[Path, ...]) -> None:
    """Run in the foreground until SIGTERM. SIGHUP looks at the files at once and reopens the access log."""
    from l4mesh.runtime.app import run as run_app

    sys.exit(run_app(_paths(paths)))


@cli.command(cls=Examples, epilog="l4mesh check -c conf/node.yaml")
@config_option
def check(paths: tuple[Path, ...]) -> None:
    """Check a configuration: every mistake with file, line and what is allowed. Exit code 1 when there is one."""
    from l4mesh.config.load import load_config

    config = load_config(_paths(paths))
    endpoints = sum(len(cluster.endpoints) for cluster in config.clusters.values())
    click.echo(f"ok: {len(config.listeners)} listeners, {len(config.clusters)} clusters, {endpoints} endpoints")


@cli.command(cls=Examples, epilog="l4mesh version")
def version() -> None:
    """Print the version."""
    click.echo(f"l4mesh {__version__}")


@cli.command(cls=Examples, epilog="sudo l4mesh demo")
def demo() -> None:
    """Show the main job on real traffic, in network namespaces of its own. Takes under 30 seconds and leaves nothing."""
    from l4mesh.demo import run_demo

    sys.exit(run_demo())


@cli.group()
def redirect() -> None:
    """The iptables rules and routes that bring traffic to the capturing listeners."""


def _rules(paths: tuple[Path, ...]) -> Any:
    from l4mesh.capture.rules import build_rules
    from l4mesh.config.load import load_config

    return build_rules(load_config(_paths(paths)))


@redirect.command("print", cls=Examples, epilog="l4mesh redirect print -c conf/node.yaml")
@config_option
def redirect_print(paths: tuple[Path, ...]) -> None:
    """Print what `apply` would put in place."""
    from l4mesh.capture.render import render_all

    click.echo(render_all(_rules(paths)), nl=False)


@redirect.command("apply", cls=Examples, epilog="sudo l4mesh redirect apply -c /etc/l4mesh --netns node-a")
@config_option
@netns_option
def redirect_apply(paths: tuple[Path, ...], netns: str | None) -> None:
    """Put the rules in place; repairs what is there. Rules of others stay as they are."""
    from l4mesh.capture.host import apply_rules

    apply_rules(_rules(paths), netns)
    click.echo("applied")


@redirect.command("check", cls=Examples, epilog="sudo l4mesh redirect check -c /etc/l4mesh")
@config_option
@netns_option
def redirect_check(paths: tuple[Path, ...], netns: str | None) -> None:
    """Compare what is in place with what should be; name each difference. Exit code 1 when there is one."""
    from l4mesh.capture.host import check_rules

    differences = check_rules(_rules(paths), netns)
    for difference in differences:
        click.echo(difference)
    if differences:
        fail(f"{len(differences)} differences: `l4mesh redirect apply` repairs them")
    click.echo("ok: rules and routes are as they should be")


@redirect.command("remove", cls=Examples, epilog="sudo l4mesh redirect remove")
@netns_option
@config_option
def redirect_remove(paths: tuple[Path, ...], netns: str | None) -> None:
    """Remove every rule and route of l4mesh. The configuration is not needed, and not read."""
    from l4mesh.capture.host import remove_rules

    remove_rules(netns)
    click.echo("removed")


@cli.command(cls=Examples, epilog="l4mesh status --admin unix:/run/l4mesh/admin.sock")
@admin_option
@click.option("--json", "as_json", is_flag=True, help="Print the server's answers as they are.")
def status(admin: str, as_json: bool) -> None:
    """Show listeners, endpoints and how connections ended."""
    from l4mesh.runtime.tables import print_status

    answers = _ask(admin, "/status", "/clusters")
    if as_json:
        click.echo(_as_json({"status": answers[0], "clusters": answers[1]["clusters"]}))
    else:
        print_status(_console(), answers[0], answers[1]["clusters"])


@cli.command(cls=Examples, epilog="l4mesh connections --limit 20")
@admin_option
@click.option("--limit", default=100, show_default=True, type=click.IntRange(1), help="How many to show.")
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def connections(admin: str, limit: int, as_json: bool) -> None:
    """Show live connections."""
    from l4mesh.runtime.tables import print_connections

    shown: list[dict[str, Any]] = []
    start: int | None = 0
    while start is not None and len(shown) < limit:
        (page,) = _ask(admin, f"/connections?start={start}&limit={min(PAGE, limit - len(shown))}")
        shown += page["connections"]
        start = page["next"]
    if as_json:
        click.echo(_as_json(shown))
    else:
        print_connections(_console(), shown, start is not None)


def _as_json(value: object) -> str:
    import json

    return json.dumps(value, indent=2)


def _console() -> Any:
    from rich.console import Console

    # Output that goes into a file or a pipe keeps its columns whatever the width of a terminal.
    return Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 200)


def _ask(admin: str, *paths: str) -> list[dict[str, Any]]:
    """The JSON answers of the admin server. Raises CommandError when it can't be reached."""
    import aiohttp

    async def ask() -> list[dict[str, Any]]:
        connector = aiohttp.UnixConnector(admin.removeprefix("unix:")) if admin.startswith("unix:") else aiohttp.TCPConnector()
        base = "http://l4mesh" if admin.startswith("unix:") else f"http://{admin}"
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            answers = []
            for path in paths:
                async with session.get(base + path) as response:
                    answers.append(await response.json())
            return answers

    reach: Callable[[str], CommandError] = lambda why: CommandError(  # noqa: E731
        f"no admin server answers at {admin} ({why}): is l4mesh running? --admin says where"
    )
    try:
        return asyncio.run(ask())
    except TimeoutError:
        raise reach("timed out") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise reach(str(error) or type(error).__name__) from None
