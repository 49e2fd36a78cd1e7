"""What one scheduler process takes: requests, tokens passed on, queues and fleets, over real sockets."""
