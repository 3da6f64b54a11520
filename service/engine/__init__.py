"""The asyncio side of the workers: admission, dispatch, supervision."""
