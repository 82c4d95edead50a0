"""The local page of `mgcc serve`: predict one image at a time, correct its mask, and save it."""
