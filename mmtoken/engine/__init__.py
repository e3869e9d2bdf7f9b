"""Attaches compressors to unmodified Hugging Face models: the only code that touches another library's modules."""
