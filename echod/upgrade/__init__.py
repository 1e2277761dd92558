"""Live upgrades: one program replaces another in the same process and keeps its clients."""
