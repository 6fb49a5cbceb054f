"""Memory as a ledger: who is on the device, in host memory, on disk; what fits; who moves. Knows nothing of cas."""
