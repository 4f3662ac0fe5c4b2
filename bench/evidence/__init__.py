"""What the claims about the method rest on: the gates of the demo world."""
