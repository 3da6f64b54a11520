"""`inpaint-service` with the fake worker: `python -m tests.http.serve_fake serve --port 0 …`."""

import functools
import sys

from service import cli
from service.api import server

if __name__ == "__main__":
    server.serve = functools.partial(server.serve, worker_target="tests.fake_worker:run")
    sys.exit(cli.main())
