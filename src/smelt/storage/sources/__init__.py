"""Where tensors come from, one kind a file: a local folder, the hub cache, memory."""
