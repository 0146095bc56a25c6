"""Published PyTorch weights in and out: the key tables, the networks in PyTorch, and the proof that both agree."""
