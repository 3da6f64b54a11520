"""`inpaint-service doctor`: what this machine has, and whether `serve` would start on it."""
