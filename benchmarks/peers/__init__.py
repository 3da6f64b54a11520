"""What others run, as small servers to measure beside this service."""
