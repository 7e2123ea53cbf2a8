"""The command line. Errors go to standard error, one line each, and say what to do; exit code 1, or 2 for wrong usage."""

from __future__ import annotations

import errno
import gc
import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlencode

import click

from l4mesh import __version__
from l4mesh.errors import CommandError, ConfigError
from l4mesh.model import Config, Workload

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
    _open_standard_streams()
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
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        fail(f"standard output: {error.strerror}")


def _open_standard_streams() -> None:
    """What is closed of them would be the number of the next socket: what is written there would go to a stranger, and libuv aborts."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


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
@click.option(
    "--manage-redirect", is_flag=True,
    help="Run as the child of a supervisor: it puts the rules of `l4mesh redirect` in place when the child serves, keeps them there, "
    "removes them at the end, and replaces a child that dies. SIGUSR2 replaces it by a new one.",
)  # fmt: skip
def run(paths: tuple[Path, ...], manage_redirect: bool) -> None:
    """Run in the foreground until SIGTERM, which drains, or SIGINT, which ends it at once. SIGHUP looks at the files at once and
    reopens the access log."""
    if manage_redirect:
        from l4mesh.runtime.supervisor import supervise

        sys.exit(supervise())
    # Until it serves: what is loaded stays, and looking for garbage in it is work for nothing.
    gc.disable()
    from l4mesh.runtime.app import run as run_app

    sys.exit(run_app(_paths(paths)))


@cli.command(cls=Examples, epilog="l4mesh upgrade -c /etc/l4mesh")
@config_option
def upgrade(paths: tuple[Path, ...]) -> None:
    """Replace the running process by a newly started one of the same command line: no connection is refused or cut.

    The running process starts it, hands over listening sockets and live plaintext connections, lets what it can't hand over end, and
    ends. Whatever goes wrong before, it goes on as it was. It is found at upgrade.socket of the configuration.
    """
    from l4mesh.config.load import load_config
    from l4mesh.runtime.upgrade import request_upgrade

    path = load_config(_paths(paths)).upgrade_socket
    if not path:
        raise CommandError("upgrade.socket is off: set it, and restart once")
    done = request_upgrade(path)
    click.echo(
        f"process {done.new} has replaced process {done.old} in {done.seconds:.3f} s; "
        f"live connections handed over: {done.handed_over}, left with it until they end: {done.left}"
    )


@cli.command(cls=Examples, epilog="l4mesh check -c conf/node.yaml\n  l4mesh check -c conf/node.yaml --explain web-1 redis-1 6379")
@config_option
@click.option(
    "--explain", nargs=3, type=str, metavar="SOURCE DESTINATION PORT",
    help="Say which policy decides about a connection. SOURCE: a workload, an address, SPIFFE_ID, or SPIFFE_ID@ADDRESS; DESTINATION: "
    "a workload or an address.",
)  # fmt: skip
def check(paths: tuple[Path, ...], explain: tuple[str, str, str] | None) -> None:
    """Check a configuration and its certificates: every mistake with file, line and what is allowed. Exit code 1 when there is one."""
    from l4mesh.config.load import load_config
    from l4mesh.datapath import try_material
    from l4mesh.identity.store import IdentityStore

    config = load_config(_paths(paths))
    store = IdentityStore(try_material)
    materials = store.refresh(config.identities)
    store.keep()
    for material in materials.values():
        for warning in material.warnings:
            click.echo(f"l4mesh: warning: {warning}", err=True)
    for _, fields in store.overdue(time.time()):
        click.echo(f"l4mesh: warning: identity {fields['identity']} {fields['state']}", err=True)
    for missing in config.identities.keys() - materials.keys():
        click.echo(f"l4mesh: warning: identity {missing} has no certificate yet; `l4mesh run` asks the CA for it", err=True)
    if explain:
        fetched = {name: identity.spiffe_id for name, identity in config.identities.items()}
        _explain(config, fetched | {name: material.spiffe_id for name, material in materials.items()}, *explain)
        return
    if config.faults_enabled:
        click.echo(f"l4mesh: warning: faults are enabled: {config.fault_rules} rules delay or break connections on purpose", err=True)
    elif config.fault_rules:
        click.echo(f"l4mesh: warning: {config.fault_rules} faults do nothing: faults.enabled is off", err=True)
    endpoints = sum(len(cluster.endpoints) for cluster in config.clusters.values())
    click.echo(f"ok: {len(config.listeners)} listeners, {len(config.clusters)} clusters, {endpoints} endpoints")


def _explain(config: Config, identities: dict[str, str], source: str, destination: str, port_text: str) -> None:
    """Exit code 1 when the connection is refused."""
    from l4mesh.config.quantities import parse_ip, parse_spiffe_id
    from l4mesh.datapath import judge

    by_name = {workload.name: workload for workload in config.workloads}
    by_address = {address: workload for workload in config.workloads for address in workload.addresses}

    def find(text: str) -> tuple[Workload | None, str]:
        if text in by_name:
            return by_name[text], by_name[text].addresses[0]
        try:
            return by_address.get(parse_ip(text)), parse_ip(text)
        except ValueError:
            raise CommandError(f"{text} is neither a workload ({', '.join(by_name) or 'there are none'}) nor an address") from None

    if not port_text.isdecimal() or not 0 < int(port_text) < 65536:
        raise CommandError(f"{port_text} is not a port")
    if source.startswith("spiffe://"):
        # No character of an identity.
        spiffe_id, _, address = source.partition("@")
        try:
            parse_spiffe_id(spiffe_id)
            address = parse_ip(address) if address else ""
        except ValueError as error:
            raise CommandError(f"the source {error}") from None
        if not address and any(peers.sources or peers.not_sources for policy in config.policies for peers in policy.peers):
            address = "0.0.0.0"
            click.echo(
                f"l4mesh: warning: policies look at addresses; {address} stands for the source's: give SPIFFE_ID@ADDRESS", err=True
            )
    else:
        workload, address = find(source)
        name = (workload.identity if workload else "") or config.node_identity
        spiffe_id = identities.get(name, "") if workload else ""
    target, _ = find(destination)
    answer = judge(config, target, spiffe_id, address or "0.0.0.0", int(port_text))
    who = (spiffe_id or "a peer without an identity") + (f" from {address}" if address else "")
    where = f"workload {target.name} in {target.namespace}" if target else f"{destination}, which is no workload of this node,"
    click.echo(f"{who} to {where} port {port_text}: {'allowed' if answer.allowed else 'refused'}")
    if answer.policy:
        click.echo(f"  because policy {answer.policy} matches, by from[{answer.peers}]")
    elif answer.allowed:
        click.echo("  because no policy denies it and no allow policy is about this destination")
    else:
        click.echo("  because there are allow policies for this destination and none of them matches")
    if answer.dry_run_refuses:
        click.echo(f"  but the dry-run policy {answer.dry_run_refuses} would refuse it")
    sys.exit(0 if answer.allowed else 1)


@cli.command(cls=Examples, epilog="l4mesh version")
def version() -> None:
    """Print the version, and that of the TLS library."""
    from l4mesh.datapath import openssl_version

    click.echo(f"l4mesh {__version__} ({openssl_version()})")


class Folder(click.Group):
    """Commands that read and write files which may not be there, or may not be touched."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.filename is None:
                raise
            raise CommandError(f"{error.filename}: {error.strerror}") from None


@cli.group(cls=Folder)
def ca() -> None:
    """A certificate authority for one mesh, kept in a folder: see `l4mesh ca init`."""


ca_folder = click.argument("folder", type=click.Path(path_type=Path))
ca_life = click.option("--life", default="24h", show_default=True, metavar="DURATION", help="How long the certificate is valid.")


def _life(text: str) -> timedelta:
    return _duration("--life", text)


def _duration(option: str, text: str) -> timedelta:
    from l4mesh.config.quantities import parse_duration_ms

    try:
        return timedelta(milliseconds=parse_duration_ms(text))
    except ValueError as error:
        raise CommandError(f"{option} {error}") from None


@ca.command("init", cls=Examples, epilog="l4mesh ca init --trust-domain example.org /etc/l4mesh/ca")
@ca_folder
@click.option("--trust-domain", required=True, metavar="DOMAIN", help="The first part of every SPIFFE ID: spiffe://DOMAIN/…")
def ca_init(folder: Path, trust_domain: str) -> None:
    """Make a CA: a root, and an intermediate that signs."""
    from l4mesh.identity.ca import CertificateAuthority

    authority = CertificateAuthority.create(folder, trust_domain)
    click.echo(f"made a CA for spiffe://{trust_domain}/ in {folder}; nodes need {authority.bundle_path} and {authority.crl_path}")
    click.echo(
        f"to give nodes their certificates over the network: name them in {authority.nodes_path}, then run: l4mesh ca serve {folder}"
    )
    click.echo(f"keep {folder}/*/root.key somewhere else when you have issued what you need; only ca rotate asks for it")


@ca.command("issue", cls=Examples, epilog="l4mesh ca issue /etc/l4mesh/ca spiffe://example.org/ns/shop/sa/web --out tls/web")
@ca_folder
@click.argument("spiffe_id")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="PATH", help="Writes PATH.pem and PATH.key.")
@ca_life
def ca_issue(folder: Path, spiffe_id: str, out: Path, life: str) -> None:
    """Issue a certificate with a new key for a workload or a node."""
    from l4mesh.identity.ca import CertificateAuthority, write_identity

    issued = CertificateAuthority(folder).issue(spiffe_id, _life(life))
    certificate, key = write_identity(out.parent, out.name, issued.certificates, issued.private_key)
    click.echo(f"{certificate} and {key}: {spiffe_id}, valid until {issued.expires.isoformat()}")


@ca.command("enroll", cls=Examples, epilog="l4mesh ca enroll /etc/l4mesh/ca spiffe://example.org/node/node-a --out node-a")
@ca_folder
@click.argument("spiffe_id")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FOLDER", help="What the node gets as its ca.folder.")
@ca_life
def ca_enroll(folder: Path, spiffe_id: str, out: Path, life: str) -> None:
    """Make the folder with which a node begins: its first certificate and what it trusts. It renews them by itself, at once."""
    from l4mesh.config.nodes import load_grants
    from l4mesh.identity.ca import CertificateAuthority
    from l4mesh.identity.renewal import enroll

    authority = CertificateAuthority(folder)
    nodes = load_grants(authority.nodes_path, authority.trust_domain).by_node
    until = enroll(authority, spiffe_id, _life(life), out).expires.isoformat()
    click.echo(f"{out}: for {spiffe_id}; bring it to the node as /var/lib/l4mesh before {until}, and remove it here")
    if spiffe_id not in nodes:
        click.echo(f"l4mesh: warning: {authority.nodes_path} does not name this node yet: it would be refused", err=True)


@ca.command("serve", cls=Examples, epilog="l4mesh ca serve /etc/l4mesh/ca --bind 192.0.2.5:15010")
@ca_folder
@click.option("--bind", default="0.0.0.0:15010", show_default=True, metavar="ADDRESS", help="Where to listen.")
@ca_life
@click.option("--timeout", default="10s", show_default=True, metavar="DURATION", help="Of a handshake, and of a connection after it.")
def ca_serve(folder: Path, bind: str, life: str, timeout: str) -> None:
    """Give nodes their workloads' certificates over mutual TLS, to each node what nodes.yaml in FOLDER lets it ask for."""
    from l4mesh.config.quantities import parse_bind
    from l4mesh.runtime.ca_server import serve

    try:
        address = parse_bind(bind)
    except ValueError as error:
        raise CommandError(f"--bind {error}") from None
    sys.exit(serve(folder, address, _life(life), _duration("--timeout", timeout).total_seconds()))


@ca.command("sign", cls=Examples, epilog="l4mesh ca sign /etc/l4mesh/ca web.csr --out web.pem")
@ca_folder
@click.argument("request", type=click.File("rb"))
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The certificate and its chain, in PEM.")
@ca_life
def ca_sign(folder: Path, request: BinaryIO, out: Path, life: str) -> None:
    """Sign a CSR whose one name is a SPIFFE ID."""
    from l4mesh.identity.ca import CertificateAuthority

    issued = CertificateAuthority(folder).sign(request.read(), _life(life))
    try:
        out.write_bytes(issued.certificates)
    except OSError as error:
        raise CommandError(f"{out}: {error.strerror}") from None
    click.echo(f"{out}: signed, valid until {issued.expires.isoformat()}")


@ca.command("revoke", cls=Examples, epilog="l4mesh ca revoke /etc/l4mesh/ca tls/web.pem")
@ca_folder
@click.argument("certificate", type=click.File("rb"))
def ca_revoke(folder: Path, certificate: BinaryIO) -> None:
    """Revoke a certificate that this CA has issued: live connections of it end where the list arrives."""
    from l4mesh.identity.ca import CertificateAuthority

    authority = CertificateAuthority(folder)
    click.echo(f"{authority.revoke(certificate.read())}: revoked; bring {authority.crl_path} to the nodes")


@ca.command("rotate", cls=Examples, epilog="l4mesh ca rotate /etc/l4mesh/ca")
@ca_folder
@click.option("--finish", is_flag=True, help="End the overlap: trust only the newest root.")
def ca_rotate(folder: Path, finish: bool) -> None:
    """Make a new root, which signs from now on. The old one stays trusted until --finish."""
    from l4mesh.identity.ca import CertificateAuthority

    authority = CertificateAuthority(folder)
    if finish:
        click.echo(f"dropped {authority.drop_old_roots()} old roots; bring {authority.bundle_path} to the nodes")
        return
    authority.rotate()
    click.echo(
        f"a new root signs; bring {authority.bundle_path} to the nodes, renew all certificates, then run: l4mesh ca rotate --finish"
    )


@ca.command("crl", cls=Examples, epilog="l4mesh ca crl /etc/l4mesh/ca")
@ca_folder
def ca_crl(folder: Path) -> None:
    """Write the revocation list anew: it says of itself that it is good for a week."""
    from l4mesh.identity.ca import CertificateAuthority

    authority = CertificateAuthority(folder)
    authority.refresh_crl()
    click.echo(f"{authority.crl_path}: written")


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
        fail(f"differences: {len(differences)}; `l4mesh redirect apply` repairs them")
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
@click.option("--cluster", default=None, metavar="NAME", help="Show the endpoints of this cluster only.")
@click.option("--json", "as_json", is_flag=True, help="Print the server's answers as they are.")
def status(admin: str, cluster: str | None, as_json: bool) -> None:
    """Show listeners, endpoints and how connections ended."""
    from l4mesh.runtime.tables import print_status

    answers = _ask(admin, "/status", "/clusters" if cluster is None else f"/clusters?{urlencode({'name': cluster})}")
    if as_json:
        click.echo(_as_json({"status": answers[0], "clusters": answers[1]["clusters"]}))
    else:
        print_status(_console(), answers[0], answers[1]["clusters"], every_endpoint=cluster is not None)


@cli.command(cls=Examples, epilog="l4mesh drain --admin unix:/run/l4mesh/admin.sock")
@admin_option
def drain(admin: str) -> None:
    """End the running process without haste: no new connections, time for those that are there (`drain`). Waits for its end."""
    pid = _ask(admin, "/status")[0]["pid"]
    try:
        # The process may be one of another PID namespace, and its number that of a stranger here.
        if b"l4mesh" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise FileNotFoundError
        process = os.pidfd_open(pid)
    except OSError:
        raise CommandError(
            f"the process that answers at {admin} is not process {pid} here: is it in a container? Drain it there"
        ) from None
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
    except PermissionError:
        raise CommandError(f"process {pid} is another user's: drain it as that user, or as root") from None
    click.echo(f"process {pid} drains")
    select.select([process], [], [])
    click.echo("it has ended")


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
    # And an IPv6 address in brackets is no markup.
    return Console(width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 200, markup=False)


def _ask(admin: str, *paths: str) -> list[dict[str, Any]]:
    """The JSON answers of the admin server. Raises CommandError when it can't be reached."""
    import asyncio

    import aiohttp

    async def ask() -> list[dict[str, Any]]:
        connector = aiohttp.UnixConnector(admin.removeprefix("unix:")) if admin.startswith("unix:") else aiohttp.TCPConnector()
        base = "http://l4mesh" if admin.startswith("unix:") else f"http://{admin}"
        timeout = aiohttp.ClientTimeout(total=10)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            answers = []
            for path in paths:
                async with session.get(base + path) as response:
                    answer = await response.json()
                    if response.status != 200 or not isinstance(answer, dict):
                        said = answer.get("error", "") if isinstance(answer, dict) else "no answer of l4mesh"
                        raise CommandError(f"{admin}{path} answers {response.status}: {said}")
                    answers.append(answer)
            return answers

    reach: Callable[[str], CommandError] = lambda why: CommandError(  # noqa: E731
        f"no admin server answers at {admin} ({why}): is l4mesh running? --admin says where"
    )
    try:
        return asyncio.run(ask())
    except TimeoutError:
        raise reach("timed out") from None
    except aiohttp.ClientConnectorError as error:
        # asyncio says the address again in the place of the reason; only the resolver's errors, below zero, have a text of their own.
        number = error.os_error.errno or 0
        raise reach(os.strerror(number) if number > 0 else error.os_error.strerror or str(error)) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise reach(str(error) or type(error).__name__) from None
