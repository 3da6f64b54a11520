"""Scripts that draw the scenes, train the bundled demo model and report on it."""
