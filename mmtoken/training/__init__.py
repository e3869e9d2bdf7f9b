"""What the objectives of several zoo models share."""
