"""Networks of the zoo and their objectives, one folder per model."""
