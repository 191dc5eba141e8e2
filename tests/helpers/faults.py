"""A proxy before an S3 server that answers as S3 does on a bad day."""

from __future__ import annotations

import contextlib
import http.client
import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit

import pytest

Fault = Literal["503", "409", "lost", None]
"""503: try later; 409: another conditional write is under way; lost: done, but nobody is told."""

ERRORS = {"503": "SlowDown", "409": "ConditionalRequestConflict"}
BODY = '<?xml version="1.0"?><Error><Code>{}</Code><Message>on purpose</Message></Error>'
SKIPPED = ("transfer-encoding", "connection", "content-length", "date", "server")


@contextlib.contextmanager
def bad_day(fault: Callable[[str, str, bool], Fault]) -> Iterator[None]:
    """Put `fault(method, path, conditional)` between this process and the S3 server."""
    upstream = urlsplit(os.environ["AWS_ENDPOINT_URL"])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            what = fault(self.command, self.path, "if-none-match" in self.headers)
            if what in ERRORS:
                text = BODY.format(ERRORS[what]).encode()
                self._answer(int(what), {"content-type": "application/xml"}, text)
                return
            server = http.client.HTTPConnection(str(upstream.hostname), upstream.port or 80)
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            data = answer.read()
            if what == "lost":
                self.close_connection = True
                self.connection.close()
                return
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in SKIPPED}
            size = answer.headers.get("content-length") if self.command == "HEAD" else None
            self._answer(answer.status, headers, data, size)

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes, size: str | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", size or str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass

        def log_message(self, *_: object) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    import s3fs

    with pytest.MonkeyPatch.context() as env:
        env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        s3fs.S3FileSystem.clear_instance_cache()
        try:
            yield
        finally:
            s3fs.S3FileSystem.clear_instance_cache()
            proxy.shutdown()
            proxy.server_close()
            thread.join()
