"""The scheduler: queues requests, batches them by length and routes them to workers."""
