"""Training: initialization, schedule, loss, optimizer, the joint loop."""
