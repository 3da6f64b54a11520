"""For every test: torch's threads must not spin on cores that other processes share."""

import os

# Read by libgomp when torch is first imported, which is after this; the service does the same for its workers.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
