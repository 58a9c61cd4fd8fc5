"""What an ONNX export's files say, checked before any runtime sees them."""
