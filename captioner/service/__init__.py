"""Captions over HTTP: pictures of many clients in, JSON out. Needs the extra `serve`."""
