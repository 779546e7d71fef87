from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class S3:
    """A real HTTP server that speaks S3. `settings`: the environment of whoever talks to it."""

    settings: dict[str, str]
    bucket: str = "training"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    from fsspec.core import url_to_fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        made = S3(settings)
        fs, bucket = url_to_fs(f"s3://{made.bucket}")
        fs.mkdir(bucket)
        yield made
    server.stop()


@pytest.fixture(params=["folder", "memory", "s3"])
def where(request, tmp_path) -> str:
    """A place for checkpoints that nothing is in: a path or a URL."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('s3').bucket}/{tmp_path.name}/runs"
    return str(tmp_path / "runs") if request.param == "folder" else f"memory://{tmp_path.name}/runs"
