"""Training: initialization, schedule, loss, optimizer, the joint loop, and the pipeline from documents to an index."""
