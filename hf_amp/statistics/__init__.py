"""Statistics of gradients, taken on their device; `snapshot.read` is the only host read."""
