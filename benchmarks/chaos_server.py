"""The service with workers that fail as planned: `python -m benchmarks.chaos_server serve …`."""

import functools
import sys

from service import cli
from service.api import server

if __name__ == "__main__":
    server.serve = functools.partial(server.serve, worker_target="benchmarks.chaos_worker:run")
    sys.exit(cli.main())
