"""Training on several devices: blocks on ranks of their own, sharded weights, synchronised batch norms."""
