"""Live streams: frames come one at a time, memory stays bounded, questions may come at any moment."""
