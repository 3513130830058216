"""An object store for tests: moto's server, a process of its own that speaks S3 over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request


class BucketServer:
    """A server on loopback; `environ` is what a client needs to use it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.environ = {
            "AWS_ENDPOINT": f"http://127.0.0.1:{self._port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
        }
        self._num_buckets = 0
        self.start()

    def new_bucket(self) -> str:
        """Make an empty bucket and return the URL of a prefix in it."""
        self._num_buckets += 1
        name = f"bucket{self._num_buckets}"
        self._request("PUT", name)
        return f"s3://{name}/federation"

    def _request(self, method: str, path: str) -> None:
        url = f"{self.environ['AWS_ENDPOINT']}/{path}"
        urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10).close()

    def start(self) -> None:
        """Start the server, with nothing in it, and wait until it answers."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(self._port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up_s = time.monotonic() + 60
        while True:
            try:
                self._request("GET", "moto-api/")
            except OSError:
                assert time.monotonic() < give_up_s
                assert self._child.poll() is None
                time.sleep(0.1)
            else:
                return

    def stop(self) -> None:
        """End the server."""
        self._child.kill()
        self._child.wait()
