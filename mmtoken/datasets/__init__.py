"""Typed sample streams: generators and readers of official file formats, one file per data set."""
