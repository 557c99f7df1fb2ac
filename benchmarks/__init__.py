"""What the published figures of this repository need beyond `sparsekd bench`."""
