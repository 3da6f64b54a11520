"""HTTP: the only place for fastapi, starlette and wire models."""
