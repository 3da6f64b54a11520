"""Load generator, peers and the arithmetic of their comparison."""
