"""What learned codecs learn, and from what."""
