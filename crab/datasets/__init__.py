"""Readers of data sets as they lie on disk, one file a source."""
