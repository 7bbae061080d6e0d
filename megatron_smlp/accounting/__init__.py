"""What a model costs, from its flags alone: parameters, FLOPs, memory and traffic."""
