"""`inpaint-service inpaint`: paints on a running service, over HTTP alone."""
