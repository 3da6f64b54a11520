"""For every test: torch's threads must not spin on cores that other processes share; no example has a time limit."""

import os
from importlib.util import find_spec

# Read by libgomp when torch is first imported, which is after this; the service does the same for its workers.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if find_spec("hypothesis") is not None:  # Where only some tests run, as on a GPU, it need not be there.
    from hypothesis import HealthCheck, settings

    # By default an example fails that takes 200 ms, and a test whose examples are slow to draw: on a busy machine, any.
    settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("untimed")
