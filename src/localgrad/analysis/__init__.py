"""What a trained network's features say: linear probes, CKA, and pictures of them."""
