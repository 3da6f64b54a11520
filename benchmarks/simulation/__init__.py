"""The service's own queue, dispatcher, batcher and worker loop on a virtual clock, with devices that only take time."""
