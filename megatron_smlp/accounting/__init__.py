"""What a model costs by its flags alone: parameters, FLOPs, memory, traffic, GPU hours."""
