"""Failures inside a worker that say what to do next; clients never see them.

Exception
├── BatchTooLarge     the device's memory did not suffice: try with fewer
└── DeviceLost        the device is unusable until the process restarts
"""


class BatchTooLarge(Exception):  # noqa: N818 - named for what happened, as the builtin KeyboardInterrupt is
    """The device's memory did not suffice for this many images at once."""


class DeviceLost(Exception):  # noqa: N818
    """The device is unusable until this process is replaced."""
