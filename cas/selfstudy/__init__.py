"""Self-study: the frozen model writes questions about every document and answers them."""
