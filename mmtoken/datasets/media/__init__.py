"""Reading images and videos. Nothing here imports torch, so decoding workers stay light."""
