"""Blocks, shards and replicas on several devices."""
