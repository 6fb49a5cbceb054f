"""Memory: which tensors are on the device, in host memory or on disk, what fits, and moving them. Never imports cas."""
