"""An S3 server in a thread, with one bucket; the environment points at it while it runs."""

from __future__ import annotations

import contextlib
import logging
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from pipeline.storage import Location, location

Seen = Callable[[str, str], None]
"""Told of every request: method and path."""


@contextlib.contextmanager
def s3_bucket(seen: Seen | None = None, secret: str = "testing") -> Iterator[Location]:
    """The bucket's folder `runs`.

    Args:
        seen: watches the requests, from the server's threads.
        secret: the secret key and the session token of the environment; any will do.
    """
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    if seen is not None:
        server._server.app = _watched(server._server.app, seen)
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        env.setenv("AWS_ACCESS_KEY_ID", "testing")
        env.setenv("AWS_SECRET_ACCESS_KEY", secret)
        env.setenv("AWS_SESSION_TOKEN", secret)
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="faces")
        try:
            yield location("s3://faces/runs")
        finally:
            # All servers of a process share what they hold: the next bucket must start empty.
            urllib.request.urlopen(
                urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
            ).close()
            s3fs.S3FileSystem.clear_instance_cache()
            server.stop()


def _watched(app: Any, seen: Seen) -> Any:
    def watched(environ: Mapping[str, Any], start_response: Any) -> Any:
        seen(environ["REQUEST_METHOD"], environ["PATH_INFO"])
        return app(environ, start_response)

    return watched
