"""The store: cartridges, optimizer state and run state on disk."""
