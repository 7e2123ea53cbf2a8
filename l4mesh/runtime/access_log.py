"""One line for each connection that ended. A log that is blocked or full costs lines, which are counted, and nothing else."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import queue
import select
import stat
import sys
import threading
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog

from l4mesh.errors import ALERTS
from l4mesh.model import AccessLog as AccessLogConfig
from l4mesh.model import LogFormat
from l4mesh.snapshot import ConnectionRecord

QUEUE_BATCHES = 64
"""Batches of at most a few hundred records that wait for the writer."""

log = structlog.get_logger()


def configure_logging() -> None:
    """The process's own events: JSON lines on standard error."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        cache_logger_on_first_use=True,
    )
    # What strangers send to the admin server is no event of ours; failures of its handlers are logged where they happen.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


class _StandardError(io.TextIOBase):
    """One that is full, blocked, or that nobody reads any more, costs lines and nothing else."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._poll.register(2, select.POLLOUT)
        # A pipe that has room has it for so much. Into a file a line goes by one write: two processes have it while one takes over.
        self._most = 1 << 30 if stat.S_ISREG(os.fstat(2).st_mode) else select.PIPE_BUF

    def write(self, line: str) -> int:
        data = line.encode()
        with contextlib.suppress(OSError):
            while data and self._poll.poll(0):
                data = data[os.write(2, data[: self._most]) :]
        return len(line)


def make_fields(record: ConnectionRecord) -> dict[str, Any]:
    """The line's fields, in their order; what is unknown is left out."""
    fields: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.ended_unix_ms / 1000, UTC).isoformat(timespec="milliseconds"),
        "event": "connection",
        "listener": record.listener,
        "cluster": record.cluster,
        "endpoint": record.endpoint,
        "source": record.source,
        "destination": record.destination,
        "reason": record.reason.label,
        "initiator": record.reason.initiator.value,
        "attempts": record.attempts,
    }
    if record.errno:
        fields["error"] = errno.errorcode.get(record.errno, str(record.errno))
    for name, us in (("connect_ms", record.connect_us), ("first_byte_ms", record.first_byte_us), ("total_ms", record.total_us)):
        if us >= 0:
            fields[name] = us / 1000
    if record.queued_ms >= 0:
        fields["queued_ms"] = record.queued_ms
    fields["bytes_to_upstream"] = record.bytes_to_upstream
    fields["bytes_to_downstream"] = record.bytes_to_downstream
    for name in ("downstream_identity", "downstream_tls", "upstream_identity", "upstream_tls", "policy", "dry_run_policy"):
        text = getattr(record, name)
        if text:
            fields[name] = text
    if record.fault:
        fields["fault"] = record.fault.label
    if record.tls_cause:
        fields["tls_error"] = record.tls_cause.label
        if record.tls_alert:
            fields["tls_alert"] = ALERTS.get(record.tls_alert, str(record.tls_alert))
    for name in ("downstream_rtt_us", "downstream_retransmits", "upstream_rtt_us", "upstream_retransmits"):
        figure = getattr(record, name)
        if figure >= 0:
            fields[name] = figure
    return fields


class AccessLog:
    """Writes records on a thread of its own. ``write`` never waits and never raises."""

    def __init__(self, config: AccessLogConfig) -> None:
        self.dropped = 0
        self._path = config.path
        self._render = (
            structlog.processors.JSONRenderer()
            if config.format == LogFormat.JSON
            else structlog.processors.LogfmtRenderer(sort_keys=False)
        )
        self._queue: queue.Queue[list[ConnectionRecord] | None] = queue.Queue(QUEUE_BATCHES)
        self._reopen = threading.Event()
        self._fd = -1
        self._torn = False
        """What was written last is not the end of a line."""
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="l4mesh-log", daemon=True)
        self._thread.start()

    def write(self, records: list[ConnectionRecord]) -> None:
        try:
            self._queue.put_nowait(records)
        except queue.Full:
            self.dropped += len(records)

    def reopen(self) -> None:
        """Opens the file anew at the next line: for log rotation."""
        self._reopen.set()

    def close(self, deadline_s: float = 1.0) -> None:
        """Waits for what is queued, but not for a log that is stuck."""
        try:
            self._queue.put(None, timeout=deadline_s)
        except queue.Full:
            return
        self._thread.join(deadline_s)

    def _run(self) -> None:
        while (records := self._queue.get()) is not None:
            self.dropped += self._put(b"".join(self._format(record) for record in records))
        self._close_file()

    def _format(self, record: ConnectionRecord) -> bytes:
        line = self._render(None, "", make_fields(record))
        return (line if isinstance(line, str) else line.decode()).encode() + b"\n"

    def _put(self, data: bytes) -> int:
        """Gives how many lines were not written. Blocks this thread as long as the reader does."""
        error = ""
        try:
            if self._fd < 0 or self._reopen.is_set():
                self._open_file()
            if self._torn:
                # What is left of a line that was given up must not take the next one with it.
                os.write(self._fd, b"\n")
                self._torn = False
            while data:
                written = os.write(self._fd, data)
                self._torn = not data[:written].endswith(b"\n")
                data = data[written:]
        except OSError as failed:
            error = os.strerror(failed.errno or 0)
        if error != self._error:
            self._error = error
            if error:
                log.error("access_log_failed", path=self._path, error=error, means="lines are lost and counted until it can be written")
            else:
                log.info("access_log_written", path=self._path, lost=self.dropped)
        return data.count(b"\n")

    def _open_file(self) -> None:
        self._reopen.clear()
        self._close_file()
        self._torn = False
        if self._path == "-":
            self._fd = sys.stdout.fileno()
        else:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _close_file(self) -> None:
        if self._fd >= 0 and self._path != "-":
            os.close(self._fd)
        self._fd = -1
