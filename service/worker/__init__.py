"""One process per device: it loads the pipeline and runs the batch."""
