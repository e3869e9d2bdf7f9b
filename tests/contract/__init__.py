"""What every compressor promises on every backbone it can be attached to."""
