"""Watched files: a change becomes a new plan, or changes nothing and says why."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
import watchfiles

from l4mesh.config.load import ConfigCache, load_config
from l4mesh.datapath import try_material
from l4mesh.errors import CommandError, ConfigError
from l4mesh.identity.store import IdentityStore
from l4mesh.identity.svid import Material
from l4mesh.model import Config

DEBOUNCE_MS = 400
STEP_MS = 80
LOOK_ANYWAY_MS = 30_000
"""Some file systems report no changes; looking costs one ``stat`` a file."""
NICENESS = 10

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ReloadStatus:
    """How loading has gone so far. ``last_error`` is of the newest attempt; None when that one succeeded."""

    generation: int = 0
    digest: str = ""
    loaded_unix_s: float = 0.0
    succeeded: int = 0
    unchanged: int = 0
    failed: int = 0
    last_error: tuple[str, ...] | None = None
    last_error_unix_s: float = 0.0


class Reloader:
    """Loads the configuration and the identities that it names, and keeps both current.

    ``apply`` makes a configuration the one in force and returns its generation; it raises CommandError when it can't, and then
    nothing has changed. It is called on a thread of its own of low priority, one call at a time: neither the workers nor the
    control loop wait for it. ``applied`` is called on the control loop with what came into force.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        apply: Callable[[Config, Mapping[str, Material]], int],
        applied: Callable[[Config], None],
        resolve: Callable[[Config], Config],
    ) -> None:
        self._paths = list(paths)
        self._apply = apply
        self._applied = applied
        self._told: Config | None = None
        self._resolve = resolve
        self._cache = ConfigCache()
        self._materials: dict[str, Material] = {}
        self.identities = IdentityStore(try_material)
        self._executor = ThreadPoolExecutor(1, "l4mesh-config", initializer=_be_nice)
        self._lock = asyncio.Lock()
        self._frozen = False
        self.status = ReloadStatus()
        self.config: Config | None = None

    @property
    def materials(self) -> Mapping[str, Material]:
        """What is in use."""
        return self._materials

    async def load_first(self) -> None:
        """Raises ConfigError or CommandError: there is no good plan yet to go on with."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._load, True, True)
        self._tell()

    def _tell(self) -> None:
        if self.config is not None and self.config is not self._told:
            self._told = self.config
            self._applied(self.config)

    async def reload(self, *, told: bool = True) -> None:
        """Looks at the files and applies what changed. A failure is counted, logged and kept in ``status``.

        ``told``: that there is a change; if there is none after all, that counts as well.
        """
        async with self._lock:
            if self._frozen:
                return
            try:
                await asyncio.get_running_loop().run_in_executor(self._executor, self._load, False, told)
            except (ConfigError, CommandError) as error:
                self._note_failure(str(error).splitlines())
            except MemoryError:
                self._note_failure(["out of memory; the files are looked at again"])
            self._tell()

    def _load(self, first: bool, told: bool) -> None:
        try:
            changed = self._use(self._resolve(load_config(self._paths, self._cache)), first)
        except (ConfigError, CommandError):
            # What can't be taken into use must not keep the certificates of what goes on from being renewed.
            if self.config:
                self._use(self.config, first)
            raise
        if changed:
            self.status = replace(self.status, succeeded=self.status.succeeded + 1, last_error=None)
        else:
            # A file that was broken and is back to what is in force is no failure any more.
            self.status = replace(self.status, unchanged=self.status.unchanged + told, last_error=None)

    def _use(self, config: Config, first: bool) -> bool:
        """Applies the configuration with the newest good certificates, unless both are in force. Raises as ``apply``."""
        materials = self.identities.refresh(config.identities)
        if (
            self.config is not None
            and config == self.config
            and config.digest == self.config.digest
            and all(self._materials.get(name) is material for name, material in materials.items())
        ):
            self._keep_identities()
            return False
        generation = self._apply(config, materials)
        self._keep_identities()
        self._materials = materials
        self.config = config
        self.status = replace(self.status, generation=generation, digest=config.digest, loaded_unix_s=time.time())
        if not first:
            log.info("config_reloaded", generation=generation)
        return True

    def _keep_identities(self) -> None:
        self.identities.keep()
        for event, fields in self.identities.events:
            (log.error if event == "identity_refused" else log.info if event == "identity_rotated" else log.warning)(event, **fields)

    def _note_failure(self, problems: list[str]) -> None:
        said = self.status.last_error == tuple(problems)
        self.status = replace(self.status, failed=self.status.failed + 1, last_error=tuple(problems), last_error_unix_s=time.time())
        if not said:
            log.error("config_refused", problems=problems, goes_on_with_generation=self.status.generation)

    async def watch(self) -> None:
        """Reloads at every change until cancelled."""
        while True:
            folders = self._folders()
            ended = asyncio.Event()
            # For what changed while nobody watched: it begins when the watch, which is there by then, first waits.
            look = asyncio.create_task(self._look(folders, ended))
            try:
                async for changes in watchfiles.awatch(
                    *folders,
                    watch_filter=None,
                    # What lies deeper is none of ours: a home, or all of /tmp, with what may not be looked at.
                    recursive=False,
                    debounce=DEBOUNCE_MS,
                    step=STEP_MS,
                    rust_timeout=LOOK_ANYWAY_MS,
                    yield_on_timeout=True,
                    stop_event=ended,
                ):
                    await self.reload(told=bool(changes))
                    # One that was moved or removed is not watched any more, though another may be in its place.
                    gone = {Path(path) for change, path in changes if change == watchfiles.Change.deleted}
                    if not gone.isdisjoint(folder.absolute() for folder in folders) or self._folders() != folders:
                        break
            except (FileNotFoundError, OSError, RuntimeError) as error:
                # A folder that is being replaced comes back, or the next look says what is missing.
                log.warning("config_watch_interrupted", error=str(error))
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                look.cancel()
                raise
            finally:
                ended.set()
            await look

    async def _look(self, folders: Mapping[Path, str], ended: asyncio.Event) -> None:
        """Sets ``ended`` when others are to be watched."""
        try:
            await self.reload(told=False)
        except BaseException:
            ended.set()
            raise
        if self._folders() != folders:
            ended.set()

    async def freeze(self) -> None:
        """What is in force stays so: the process ends, or another takes over."""
        self._frozen = True
        async with self._lock:
            pass

    async def thaw(self) -> None:
        """Takes ``freeze`` back, and looks at what was missed."""
        self._frozen = False
        await self.reload()

    def _folders(self) -> dict[Path, str]:
        files = [Path(file) for identity in self.config.identities.values() for file in identity.files] if self.config else []
        return _folders([*self._paths, *map(Path, list(self._cache.files)), *files])

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def _folders(paths: Sequence[Path]) -> dict[Path, str]:
    """What to watch, and where that is by now: folders, because editors and Kubernetes replace files instead of writing them, and
    those with a link on the way, because whoever deploys by links replaces that."""
    # Those of os.path, which raise nothing where a path may not be looked at: what is wrong with it the next look says.
    folders = {path if os.path.isdir(path) else path.parent for path in paths}
    folders |= {Path(os.path.realpath(path)).parent for path in paths if os.path.islink(path)}
    folders |= {part.parent for part in {part for path in paths for part in (path, *path.parents)} if os.path.islink(part)}
    return {folder: os.path.realpath(folder) for folder in sorted(folders) if os.path.exists(folder)}


def _be_nice() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
