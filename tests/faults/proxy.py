"""An HTTP proxy on loopback that injects faults: responses of 503, broken connections, false successes."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal["503", "cut_before", "cut_after", "cut_body"]
"""A response of 503; a connection that breaks before the request is sent, after its execution, or in the response."""
FalseSuccess = Literal["accepted"]
"""A response of 200 to a request that is not sent to the server."""
FAULTS: tuple[Fault, ...] = get_args(Fault)
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class FaultProxy:
    """A proxy for HTTP/1.1 requests to `endpoint`, served by a thread. Call `close` at the end."""

    def __init__(self, endpoint: str) -> None:
        target = urlsplit(endpoint)
        self.target = (target.hostname, target.port)
        self.requests: Counter[str] = Counter()
        """Number of requests by method, including those with an injected fault."""
        self.injected: Counter[str] = Counter()
        """Number of injected faults by kind."""
        self._armed: deque[tuple[Fault | FalseSuccess, Callable[[str, str], bool]]] = deque()
        self._loop = asyncio.new_event_loop()
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def arm(
        self, fault: Fault | FalseSuccess, count: int = 1, when: Callable[[str, str], bool] = lambda method, path: True
    ) -> None:
        """Inject a fault into each of the next `count` requests whose method and path `when` accepts."""
        self._armed.extend([(fault, when)] * count)

    def disarm(self) -> None:
        """Drop the faults that were not injected yet."""
        self._armed.clear()

    def close(self) -> None:
        """Stop the proxy."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve_client, "127.0.0.1", 0))
        self.port = int(server.sockets[0].getsockname()[1])
        started.set()
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    def _next_fault(self, method: str, path: str) -> Fault | FalseSuccess | None:
        self.requests[method] += 1
        if self._armed and self._armed[0][1](method, path):
            fault = self._armed.popleft()[0]
            self.injected[fault] += 1
            return fault
        return None

    async def _serve_client(self, client: asyncio.StreamReader, response: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            server, request = await asyncio.open_connection(*self.target)
            try:
                while await self._forward(client, response, server, request):
                    pass
            finally:
                request.close()
        with suppress(ConnectionError):
            response.transport.abort()

    async def _forward(
        self,
        client: asyncio.StreamReader,
        response: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        request: asyncio.StreamWriter,
    ) -> bool:
        """Forward one request and its response; return False if the connection is to be closed."""
        head = await _head(client)
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        fault = self._next_fault(method, path)
        if fault == "cut_before":
            return False
        if b"expect: 100-continue" in head.lower():
            response.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _body(client, head)
        if fault == "accepted":
            response.write(b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\n\r\n')
            await response.drain()
            return True
        if fault == "503":
            length = b"" if method == "HEAD" else SLOW_DOWN
            response.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: %d\r\n\r\n%s" % (len(length), length))
            await response.drain()
            return True
        request.write(head + body)
        await request.drain()
        reply = await _head(server)
        while reply.startswith(b"HTTP/1.1 100"):
            reply = await _head(server)
        status = int(reply.split(b" ", 2)[1])
        content = b"" if method == "HEAD" or status in (204, 304) else await _body(server, reply)
        if fault == "cut_after":
            return False
        if fault == "cut_body":
            content = content[: len(content) // 2]
        response.write(reply + content)
        await response.drain()
        return fault is None


async def _head(stream: asyncio.StreamReader) -> bytes:
    return await stream.readuntil(b"\r\n\r\n")


async def _body(stream: asyncio.StreamReader, head: bytes) -> bytes:
    """Return the body that follows `head`, still encoded."""
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if b"chunked" in fields.get(b"transfer-encoding", b""):
        body = b""
        while True:
            line = await stream.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            if size == 0:
                return body + line + await stream.readuntil(b"\r\n")
            body += line + await stream.readexactly(size + 2)
    return await stream.readexactly(int(fields.get(b"content-length", b"0")))
