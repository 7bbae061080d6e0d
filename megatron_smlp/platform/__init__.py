"""The device of a process, and what a machine without a GPU needs of torch and Megatron."""
