"""Shards in, shards out: captions of more pictures than one run, one machine or one process sees."""
