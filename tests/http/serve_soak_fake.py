"""`benchmarks.soak_server` with the fake worker: `python -m tests.http.serve_soak_fake [--leak] serve --port 0 …`."""

import functools
import sys

from benchmarks import soak_server
from service.api import server

if __name__ == "__main__":
    server.serve = functools.partial(server.serve, worker_target="tests.fake_worker:run")
    sys.exit(soak_server.main(sys.argv[1:]))
