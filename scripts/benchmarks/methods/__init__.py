"""Compression methods on a real model: quality at equal bytes, recall, speed."""
