"""mmtoken."""
