"""Analyses of a trained network's features: linear probes, CKA, and pictures of features."""
