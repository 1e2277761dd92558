"""The benchmark: echod, its peers and the practical limit, measured side by side in one run."""
