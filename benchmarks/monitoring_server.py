"""The service with workers that fail on demand: `python -m benchmarks.monitoring_server serve …`."""

import functools
import sys

from service import cli
from service.api import server

if __name__ == "__main__":
    server.serve = functools.partial(server.serve, worker_target="benchmarks.monitoring_worker:run")
    sys.exit(cli.main())
