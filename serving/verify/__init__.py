"""An export compared with the checkpoint it was made from."""
