"""An HTTP proxy on loopback that answers 503 or cuts the connection when it is told to."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal["503", "cut_before", "cut_after", "cut_body"]
"""An answer of 503; a connection cut before the server hears, after it has acted, in the middle of its answer."""
Lie = Literal["accepted"]
"""An answer of 200 for what the server never hears of."""
FAULTS: tuple[Fault, ...] = get_args(Fault)
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class FaultProxy:
    """Forwards HTTP/1.1 to `endpoint`, request by request, from a thread of its own; to be closed."""

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint)
        self.target = (target.hostname, target.port)
        self.requests: Counter[str] = Counter()
        """Requests by method, those that were refused included."""
        self.suffered: Counter[str] = Counter()
        self._armed: deque[tuple[Fault | Lie, Callable[[str, str], bool]]] = deque()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def arm(
        self, fault: Fault | Lie, count: int = 1, when: Callable[[str, str], bool] = lambda method, path: True
    ) -> None:
        """Do that to the next `count` requests whose method and path `when` accepts."""
        self._armed.extend([(fault, when)] * count)

    def disarm(self) -> None:
        """Forget what has not happened yet."""
        self._armed.clear()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._talk, "127.0.0.1", 0))
        self.port = int(server.sockets[0].getsockname()[1])
        started.set()
        self._loop.run_forever()
        server.close()
        talks = asyncio.all_tasks(self._loop)
        for talk in talks:
            talk.cancel()
        self._loop.run_until_complete(asyncio.gather(*talks, return_exceptions=True))
        self._loop.close()

    def _next_fault(self, method: str, path: str) -> Fault | Lie | None:
        self.requests[method] += 1
        if self._armed and self._armed[0][1](method, path):
            fault = self._armed.popleft()[0]
            self.suffered[fault] += 1
            return fault
        return None

    async def _talk(self, client: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            server, ask = await asyncio.open_connection(*self.target)
            try:
                while await self._pass_one(client, answer, server, ask):
                    pass
            finally:
                ask.close()
        with suppress(ConnectionError):
            answer.transport.abort()

    async def _pass_one(
        self,
        client: asyncio.StreamReader,
        answer: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        ask: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = await _head(client)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        fault = self._next_fault(method, path)
        if fault == "cut_before":
            return False
        if b"expect: 100-continue" in head.lower():
            answer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(client, head)
        if fault == "accepted":
            answer.write(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\n\r\n')
            await answer.drain()
            return True
        if fault == "503":
            length = b"" if method == "HEAD" else SLOW_DOWN
            answer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(length), length))
            await answer.drain()
            return True
        ask.write(head + body)
        await ask.drain()
        reply = await _head(server)
        while reply.startswith(b"HTTP/1.1 100"):
            reply = await _head(server)
        status = int(reply.split(b" ", 2)[1])
        content = b"" if method == "HEAD" or status in (204, 304) else await _body(server, reply)
        if fault == "cut_after":
            return False
        if fault == "cut_body":
            content = content[: len(content) // 2]
        answer.write(reply + content)
        await answer.drain()
        return fault is None


async def _head(stream: asyncio.StreamReader) -> bytes:
    return await stream.readuntil(b"\r\n\r\n")


async def _body(stream: asyncio.StreamReader, head: bytes) -> bytes:
    """The body that follows `head`, as it stands on the wire."""
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        whole = b""
        while True:
            line = await stream.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if size == 0:
                return whole + line + await stream.readuntil(b"\r\n")
            whole += line + await stream.readexactly(size + 2)
    return await stream.readexactly(int(fields.get(b"content-length", b"0")))
