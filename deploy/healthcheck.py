# ruff: noqa: INP001 - a script of the image, no module of the package
"""Exit 0 when the service in this container answers 200 on a path, else 1.

Usage: python healthcheck.py [/healthz | /readyz]

Standard library only: the image has no curl. The port is the service's own
setting; the path is the caller's choice between liveness and readiness.
"""

import os
import sys
import urllib.error
import urllib.request
from http import HTTPStatus

TIMEOUT_SECONDS = 4.0


def check(path: str, port: int) -> int:
    """The exit status for `http://127.0.0.1:{port}{path}`: 0 for an answer of 200, 1 for anything else."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # Loopback never goes through a proxy.
    try:
        with opener.open(f"http://127.0.0.1:{port}{path}", timeout=TIMEOUT_SECONDS) as answer:
            return 0 if answer.status == HTTPStatus.OK else 1
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{path}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(check(sys.argv[1] if len(sys.argv) > 1 else "/healthz", int(os.environ.get("INPAINT_PORT", "8000"))))
