"""Lines that break, on which a node reaches its coordinator: a TCP proxy in a process of its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from multiprocessing.connection import Connection

BLOCK_BYTES = 1 << 18


@dataclass(frozen=True)
class Line:
    """What becomes of a connection once `after_bytes` have gone to the coordinator; the `times` first ones fare so.

    `fault` is "cut" (closed at both ends), "silent" (nothing more, and nobody is told), "trickle" (one byte a second),
    "corrupt" (a bit is another), "truncate" (one end hears that the other has finished), or "" for none; and all that
    comes is late by `delay_s`.
    """

    fault: str = ""
    after_bytes: int = 0
    times: int = 1
    delay_s: float = 0.0


def forward(address: str, target: str, line: Line, out: Connection) -> None:
    """Listen on one address and forward to another, for ever."""
    asyncio.run(_Proxy(line, target).listen(address, out))


class _Proxy:
    def __init__(self, line: Line, target: str) -> None:
        self._line, self._left = line, line.times
        self._host, _, self._port = target.rpartition(":")

    async def listen(self, address: str, out: Connection) -> None:
        host, _, port = address.rpartition(":")
        server = await asyncio.start_server(self._connected, host, int(port))
        out.send("listening")
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
        except OSError:
            writer.close()
            return
        both = (writer, far_writer)
        silenced = asyncio.Event()
        await asyncio.gather(
            self._pipe(reader, far_writer, both, silenced, is_up=True),
            self._pipe(far_reader, writer, both, silenced, is_up=False),
            return_exceptions=True,
        )

    async def _pipe(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        both: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
        silenced: asyncio.Event,
        *,
        is_up: bool,
    ) -> None:
        line, num_bytes = self._line, 0
        try:
            while data := await reader.read(BLOCK_BYTES):
                if line.delay_s:
                    await asyncio.sleep(line.delay_s)
                if silenced.is_set():
                    continue
                until = line.after_bytes - num_bytes
                num_bytes += len(data)
                if is_up and line.fault and self._left > 0 and num_bytes > line.after_bytes:
                    self._left -= 1
                    writer.write(data[: max(until, 0)])
                    rest = data[max(until, 0) :]
                    if line.fault == "corrupt":
                        rest = bytes([rest[0] ^ 1]) + rest[1:]
                    elif line.fault == "trickle":
                        await self._trickle(rest, reader, writer)
                        return
                    elif line.fault == "silent":
                        silenced.set()
                        continue
                    elif line.fault == "truncate":
                        writer.write_eof()
                        return
                    else:
                        for each in both:
                            each.transport.abort()
                        return
                    writer.write(rest)
                else:
                    writer.write(data)
                await writer.drain()
        finally:
            if not silenced.is_set():
                writer.close()

    async def _trickle(self, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send a byte a second for as long as the other end takes them."""
        while data or (data := await reader.read(BLOCK_BYTES)):
            writer.write(data[:1])
            await writer.drain()
            data = data[1:]
            await asyncio.sleep(1)
