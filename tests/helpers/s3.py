"""An S3 server in a thread, with one bucket; the environment points at it while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from pipeline.storage import Location, location


@contextlib.contextmanager
def s3_bucket() -> Iterator[Location]:
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as env:
        env.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        env.setenv("AWS_ACCESS_KEY_ID", "testing")
        env.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        env.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="faces")
        yield location("s3://faces/runs")
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
