"""Read weights from safetensors, torch files and DeepSpeed checkpoints, check them, and write them as streams."""
